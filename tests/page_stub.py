"""
Runs a page of this project without a browser: its script in QuickJS, on a small stand-in for the document.

    page = Page(html, hash="#L=64")     # checks the page (see check_file), builds its elements, runs its script
    page.input("L", 7)                  # moves a slider, types into a field or chooses from a list
    page.click("play")                  # an id, or a selector such as '#cards input[value="hope"]'
    page.key("text", "ArrowRight")
    page.run("state.L")                 # the value of any JavaScript, with the script's own names
    page.check_content()                # no NaN, undefined or Infinity in any text or attribute; fails otherwise

Each action also runs what the page has scheduled by then (frames, timers, observers). An exception in the page's script
fails the test as a quickjs.JSException. The stand-in knows elements, attributes, innerHTML, selectors made of tags,
#ids, .classes and [attributes], and events (page_stub.js). It is strict: tags that are not closed, selectors that it
cannot read and methods that it does not have are errors. Layout is made up: every element is as wide as the window, and
at the top.
"""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import quickjs

DOCUMENT = Path(__file__).with_name("page_stub.js").read_text(encoding="utf-8")
ADDRESSES = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "ping", "xlink:href"}
REQUESTS = re.compile(r"https?:|(?<![:\w])//\w+\.\w|@import|\burl\((?!#)|\bfetch\(|XMLHttpRequest|WebSocket|EventSource"
                      r"|sendBeacon|importScripts|\bimport\s*\(|\bimport\b.*\bfrom\b")


class PageParser(HTMLParser):
    """What a page consists of: its ids, the addresses it names, its scripts as (attributes, text)."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.ids, self.addresses, self.scripts, self.in_script = [], [], [], False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ADDRESSES]
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self.in_script = self.in_script and tag != "script"

    def handle_data(self, data):
        if self.in_script:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data


def check_file(html):
    """Unique ids, no address outside the page, one script beside data. -> (the script, data: id -> text)."""
    parsed = PageParser(html)
    data = {attributes["id"]: text for attributes, text in parsed.scripts
            if attributes.get("type") == "application/json"}
    code = [text for attributes, text in parsed.scripts if attributes.get("type") != "application/json"]
    assert len(code) == 1, f"{len(code)} scripts"
    repeated = {name for name in parsed.ids if parsed.ids.count(name) > 1}
    assert not repeated, f"ids that occur twice: {repeated}"
    outside = [value for value in parsed.addresses if not (value or "").startswith(("#", "data:"))]
    assert not outside, f"addresses outside the page: {outside}"
    text = html
    for held in data.values():  # a passage of text may contain any address
        text = text.replace(held, "")
    request = REQUESTS.search(text)
    assert not request, f"a request: {text[request.start():request.start() + 60]!r}"
    return code[0], data


class Page:
    """A page whose script has run. width is that of the window, in pixels. Raises AssertionError or JSException."""

    def __init__(self, html, hash="", width=1000):
        code, _ = check_file(html)
        self.js = quickjs.Context()
        self.js.eval(DOCUMENT)
        self.js.eval(f"stub.open({json.dumps(html)}, {json.dumps(hash)}, {width})")
        self.js.eval(code)
        self.js.eval("stub.settle(5)")

    def run(self, code):
        """Evaluate JavaScript. -> its value, with lists and dicts for arrays and objects; None for undefined."""
        value = self.js.eval(code)
        return json.loads(value.json()) if isinstance(value, quickjs.Object) else value

    def act(self, call):
        """Run one of the stand-in's actions, then what is scheduled, 5 rounds at most: animations never end."""
        self.js.eval(f"{call}; stub.settle(5)")

    def input(self, target, value):
        """Give a slider, field or list a value as a user would: limits apply, and its events follow."""
        self.act(f"stub.input({json.dumps(target)}, {json.dumps(value)})")

    def click(self, target):
        """Click an element. A check box changes, a radio button is chosen."""
        self.act(f"stub.click({json.dumps(target)})")

    def key(self, target, key):
        """Press a key ("ArrowLeft") on an element; the event bubbles up to the window."""
        self.act(f"stub.send({json.dumps(target)}, 'keydown', {{key: {json.dumps(key)}}})")

    def send(self, target, type, **fields):
        """Send any other event, e.g. send("chart", "pointermove", offsetX=5, buttons=1)."""
        self.act(f"stub.send({json.dumps(target)}, {json.dumps(type)}, {json.dumps(fields)})")

    def text(self, target="body"):
        """The text below an element, without scripts and styles."""
        return self.run(f"stub.text(stub.find({json.dumps(target)}))")

    def check_content(self):
        """No number that is none, in any text or attribute."""
        html = self.run("stub.html(document.body)")
        wrong = re.search(r"\b(NaN|undefined|Infinity)\b|\[object", html)
        assert not wrong, f"...{html[max(0, wrong.start() - 80):wrong.end() + 40]}..."
