"""
Runs a page of this project without a browser: its script in QuickJS, on a small stand-in for the
document (page_stub.js).

    page = Page(html, hash="#L=64")
    page.input("L", 7)                  # an id, or a selector

Each action also runs what the page has scheduled by then (frames, timers, observers). An exception
in the page's script fails the test as a quickjs.JSException; so do tags that are not closed and
selectors or methods that the stand-in does not have. Layout is made up: every element is as wide as
the window, and at the top.
"""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import quickjs

DOCUMENT = Path(__file__).with_name("page_stub.js").read_text(encoding="utf-8")
ADDRESSES = {"src", "href", "srcset", "action", "data", "poster"}
LINK = re.compile(r'<a\s+href="[^"]*"')  # loads nothing until a reader follows it
REQUESTS = re.compile(r"https?:|(?<![:\w])//\w+\.\w|@import|\burl\((?!#)|\bfetch\(|XMLHttpRequest"
                      r"|WebSocket|EventSource|sendBeacon|\bimport\s*\(|\bimport\b.*\bfrom\b")


class PageParser(HTMLParser):
    """What a page consists of: its ids, the addresses it names, its scripts by their type."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.addresses, self.scripts, self.script = [], [], {}, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ADDRESSES and tag != "a"]
        if tag == "script":
            self.script = dict(attrs).get("type", "code")
            assert self.script not in self.scripts, "two scripts of a type"
            self.scripts[self.script] = ""

    def handle_endtag(self, tag):
        self.script = None

    def handle_data(self, data):
        if self.script:
            self.scripts[self.script] += data


def check_file(html):
    """A page with one script, unique ids and no address outside -> the script."""
    parsed = PageParser(html)
    assert len(set(parsed.ids)) == len(parsed.ids), "an id occurs twice"
    assert all((value or "").startswith(("#", "data:")) for value in parsed.addresses)
    # a passage of text may contain any address
    code = LINK.sub("<a", html.replace(parsed.scripts.get("application/json", ""), ""))
    request = REQUESTS.search(code)
    assert not request, f"a request: {request}"
    return parsed.scripts["code"]


class Page:
    """A page whose script has run. width is that of the window, in pixels."""

    def __init__(self, html, hash="", width=1000):
        code = check_file(html)
        self.js = quickjs.Context()
        self.js.eval(DOCUMENT)
        self.act(f"stub.open({json.dumps(html)}, {json.dumps(hash)}, {width})")
        self.act(code)

    def run(self, code):
        """Evaluate JavaScript -> lists and dicts for arrays and objects, None for undefined."""
        value = self.js.eval(code)
        return json.loads(value.json()) if isinstance(value, quickjs.Object) else value

    def act(self, call):
        """Run JavaScript, then what is scheduled, at most five rounds: animations never end."""
        self.js.eval(call)
        self.js.eval("stub.settle(5)")

    def input(self, target, value):
        self.act(f"stub.input({json.dumps(target)}, {json.dumps(value)})")

    def click(self, target):
        self.act(f"stub.click({json.dumps(target)})")

    def key(self, target, key):
        self.send(target, "keydown", key=key)

    def send(self, target, type, **fields):
        self.act(f"stub.send({json.dumps(target)}, {json.dumps(type)}, {json.dumps(fields)})")

    def text(self, target="body"):
        """The text below an element, without scripts and styles."""
        return self.run(f"stub.text(stub.find({json.dumps(target)}))")

    def check_content(self):
        """No NaN, undefined or Infinity in a text or an attribute."""
        html = self.run("stub.html(document.body)")
        wrong = re.search(r"\b(NaN|undefined|Infinity)\b|\[object", html)
        assert not wrong, html[max(0, wrong.start() - 80):wrong.end() + 40]
