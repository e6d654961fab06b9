"""How the web page shows what a model writes, in a real headless Chromium."""

from __future__ import annotations

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.support.pages import click, needs_chromium, shown, until

pytestmark = needs_chromium


@pytest.mark.parametrize(
    "text,expected",
    [
        (
            "# One\n\ntwo **b** `a<b`\nthree",
            "<h2>One</h2><p>two <strong>b</strong> <code>a&lt;b</code><br>three</p>",
        ),
        ("- a\n  1. b\n- [x] c", "<ul>\n<li>a<ol>\n<li>b</li>\n</ol>\n</li>\n<li>\u2611 c</li>\n</ul>"),
        ("| a | b |\n|---|--:|\n| 1 | 2 |", '<td align="right">2</td>'),
        ("```py\nx = 1 < 2", '<pre tabindex="0"><code class="language-py">x = 1 &lt; 2\n</code></pre>'),
        ("```py\nx", '<div><span>py</span><button type="button">Copy</button></div>'),
        (
            "[ok](https://a.example/)",
            '<a href="https://a.example/" target="_blank" rel="noopener noreferrer">ok</a>',
        ),
        (r"\(a_1 * b_2 * c\) for $5 or $6", r'<span class="math">\(a_1 * b_2 * c\)</span> for $5 or $6'),
        ("\\[\n- x\n= y_1\n\\]", '<p class="math">\\[\n- x\n= y_1\n\\]</p>'),
    ],
)
def test_markdown(page: Chrome, text: str, expected: str) -> None:
    assert expected in shown(page, text)
    growing = [text[:end] for end in range(1, len(text) + 1)]
    assert shown(page, *growing) == shown(page, text)


HOSTILE = [
    "<script>window.hit = 1</script>",
    "a <script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "a <svg onload='window.hit = 1'><script>window.hit = 1</script></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=1>",
    "<iframe srcdoc='<script>parent.hit = 1</script>'></iframe><style>* { display: none }</style>",
    "[a](javascript:window.hit=1) [b](JaVaScRiPt:window.hit=1) [c](java&#10;script:window.hit=1)",
    "<javascript:window.hit=1> [a](data:text/html;base64,PHNjcmlwdD4=) ![a](data:image/svg+xml,x)",
    '![a](x"onerror=window.hit=1) [a](https://e.example/\'onclick=window.hit=1 "t\' onclick=window.hit=1")',
    '[a](https://e.example/"onclick="window.hit=1) ![x" onerror="window.hit=1](https://e.example/p.png)',
    "[a][r]\n\n[r]: javascript:window.hit=1",
    '```"><img/src=x/onerror=window.hit=1>\n</code></pre><script>window.hit = 1</script>',
    "| <img src=x onerror=window.hit=1> | b |\n|---|---|\n| <a href=javascript:window.hit=1>x</a> | c |",
    "$<img src=x onerror=window.hit=1>$ \\(<script>window.hit=1</script>\\)",
    "- <form action=https://e.example><input name=a><button>b</button></form>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_writes_is_only_read(page: Chrome, text: str) -> None:
    """Also while it comes: nothing runs, nothing is fetched, nothing leads anywhere but to the web."""
    page.get_log("browser")
    shown(page, *(text[:end] for end in range(1, len(text) + 1)))
    found = page.execute_async_script(
        """const done = arguments[0];
        setTimeout(() => done([
          window.hit ?? null,
          document.querySelectorAll("main :is(script, img, svg, math, style, iframe, form, input)").length,
          [...document.querySelectorAll("main a")].map((link) => link.protocol)
            .filter((name) => name !== "https:"),
          [...document.querySelectorAll("main *")].flatMap((node) => node.getAttributeNames())
            .filter((name) => /^on|style|src/.test(name)),
        ]), 50);"""
    )
    assert found == [None, 0, [], []]
    assert page.get_log("browser") == []


def test_long_answers_stay_quick(page: Chrome) -> None:
    """Only what changed is drawn again: the nodes before stay. What nests too deep is text."""
    found = page.execute_async_script(
        """const done = arguments[0];
        import("/markdown.js").then(({ Markdown }) => {
          const markdown = new Markdown();
          const text = "Some *words* and `code`.\\n\\n| a | b |\\n|---|---|\\n| 1 | 2 |\\n\\n".repeat(1000);
          const start = performance.now();
          markdown.show(text);
          const first = [...markdown.node.children].slice(0, -1);
          const begun = performance.now();
          for (let more = 0; more < 10; more++) markdown.show(text + "More".repeat(more));
          const took = (performance.now() - begun) / 10 / (begun - start);
          const same = first.every((node, at) => node === markdown.node.children[at]);
          markdown.show(">".repeat(20000));
          done([first.length, same, took, markdown.node.textContent.length]);
        });"""
    )
    blocks, same, took, length = found
    assert (blocks, same, length) == (1999, True, 20000)
    assert took < 0.5, f"{took} of the first drawing for each of ten updates of 55,000 characters"


def test_code_is_copied(page: Chrome) -> None:
    page.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    shown(page, "```py\nx = 1 < 2\n```")
    page.execute_script("document.getElementById('greeting').hidden = true")
    click(page, ".code button")
    until(page, lambda: page.find_element(By.CSS_SELECTOR, ".code button").text == "Copied")
    script = "navigator.clipboard.readText().then(arguments[0])"
    assert page.execute_async_script(script) == "x = 1 < 2\n"
