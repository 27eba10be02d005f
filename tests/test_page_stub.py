"""The stand-in for a browser (page_stub.py) fails where a page is wrong."""
import pytest
import quickjs

from tests.page_stub import Page, check_file

PAGE = """<!doctype html><html lang="en"><body><p id="out" class="a b"></p>
<input type="range" id="L" min="1" max="9" step="2"><button id="go">go</button>
<script id="data" type="application/json">{"text": "see https://example.org <p>"}</script>
<script>const $ = id => document.getElementById(id), out = $("out"); %s</script></body></html>"""


def test_actions_reach_the_script():
    page = Page(PAGE % """
        const write = text => { out.innerHTML = `<b>${text}</b>`; };
        const {text} = JSON.parse($("data").textContent);
        $("L").oninput = event => write(event.target.value);
        $("go").onclick = () => setTimeout(() => write(text.length), 100);
        addEventListener("keydown", event => write(event.key));""")
    for act, text in ((lambda: page.input("L", 100), "9"), (lambda: page.input("L", 4.2), "5"),
                      (lambda: page.click("go"), "27"), (lambda: page.key("L", "x"), "x")):
        act()
        assert page.text("#out b") == page.text("out") == text
    page.check_content()


@pytest.mark.parametrize("script", (
    "$('none').textContent = 1", "out.frobnicate()", "out.innerHTML = '<p><b></p>'",
    "out.innerHTML = 'a < b'", "console.error('no')", "document.querySelectorAll('p > b')"))
def test_exceptions_fail(script):
    with pytest.raises(quickjs.JSException):
        Page(PAGE % script)


@pytest.mark.parametrize("script", (
    "out.textContent = 0 / 0", "out.setAttribute('d', 'M0 ' + 1 / 0)", "out.innerHTML = void 0",
    "out.textContent = {}", "out.style.setProperty('--share', undefined)"))
def test_values_that_are_no_numbers_fail(script):
    with pytest.raises(AssertionError):
        Page(PAGE % script).check_content()


@pytest.mark.parametrize("html", (
    '<p id="a"></p><p id="a"></p><script></script>', "<script></script><script></script>",
    '<img src="a.png"><script></script>', '<script src="//cdn.example.org/x.js"></script>',
    "<style>p { background: url(a.png) }</style><script></script>", "<script>fetch('x')</script>",
    "<p>https://example.org</p><script></script>"))
def test_files_that_need_others_or_repeat_ids_fail(html):
    with pytest.raises(AssertionError):
        check_file(html)
