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
from pathlib import Path

import quickjs

DOCUMENT = Path(__file__).with_name("page_stub.js").read_text(encoding="utf-8")
ADDRESSES = {"src", "href", "srcset", "action", "data", "poster"}
LINK = re.compile(r'<a\s+href="[^"]*"')  # loads nothing until a reader follows it
REQUESTS = re.compile(r"https?:|(?<![:\w])//\w+\.\w|@import|\burl\((?!#)|\bfetch\(|XMLHttpRequest"
                      r"|WebSocket|EventSource|sendBeacon|\bimport\s*\(|\bimport\b.*\bfrom\b")


class Page:
    """A page whose script has run. width is that of the window, in pixels."""

    def __init__(self, html, hash="", width=1000):
        self.js = quickjs.Context()
        self.js.eval(DOCUMENT)
        self.act(f"stub.open({json.dumps(html)}, {json.dumps(hash)}, {width})")
        self.act(self.checked_script(html))

    def checked_script(self, html):
        """A page with unique ids, one script beside its data, no address outside -> the script."""
        elements = self.run("descendants(document).map(e => [e.localName, e.attributes])")
        ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
        assert len(set(ids)) == len(ids), "an id occurs twice"
        assert all(value.startswith(("#", "data:")) for tag, attributes in elements if tag != "a"
                   for name, value in attributes.items() if name in ADDRESSES)
        *texts, code = self.run("document.querySelectorAll('script').map(e => e.textContent)")
        assert len(texts) <= 1, "only one script may be code"
        passage = texts[0] if texts else ""  # which may contain any address
        request = REQUESTS.search(LINK.sub("<a", html.replace(passage, "")))
        assert not request, f"a request: {request}"
        return code

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
        content = self.run("stub.content()")
        wrong = re.search(r"\b(NaN|undefined|Infinity)\b|\[object", content)
        assert not wrong, content[max(0, wrong.start() - 80):wrong.end() + 40]
