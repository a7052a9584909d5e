"""A good page, tests of it, and copies with one thing wrong that a careless check would let pass."""

import dataclasses

from qcn_jax.envs.web.page_tests import PageTest, Suite

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sign up</title>
<style>
* { box-sizing: border-box; }
body { margin: 0; font-family: sans-serif; color: #222; background: #fff; }
main { display: flex; flex-wrap: wrap; gap: 16px; max-width: 900px; margin: 0 auto; padding: 16px; }
section { flex: 1 1 300px; min-width: 0; }
label { display: block; }
input { width: 100%; height: 32px; }
button { min-width: 96px; height: 40px; }
.badge { position: absolute; z-index: 0; }
footer { position: relative; z-index: 1; padding: 16px; }
</style>
</head>
<body>
<main>
<section>
<h1>Sign up</h1>
<label for="name">Your name</label>
<input id="name">
<label for="mail">E-mail</label>
<input id="mail">
<button id="join">Join</button>
<button id="clear">Clear</button>
</section>
<section>
<h2>Members</h2>
<ul id="members"></ul>
<p role="status" id="status"></p>
</section>
</main>
<footer><a href="#top">Back to top</a></footer>
<script>
const field = (id) => document.getElementById(id);
field('join').addEventListener('click', () => {
  if (field('name').value === '') {
    field('status').textContent = 'Please give a name';
    return;
  }
  const member = document.createElement('li');
  member.textContent = field('name').value;
  field('members').append(member);
  field('status').textContent = 'Welcome, ' + field('name').value;
  field('name').value = '';
  field('name').focus();
});
field('clear').addEventListener('click', () => { field('name').value = ''; });
</script>
</body>
</html>
"""
NAME, MAIL = {"label": "Your name"}, {"label": "E-mail"}
JOIN, CLEAR = {"role": "button", "name": "Join"}, {"role": "button", "name": "Clear"}
TITLE, MEMBERS = {"role": "heading", "name": "Sign up"}, {"role": "heading", "name": "Members"}
TESTS = (
    PageTest("joins", ({"type": "Ada", "into": NAME}, {"click": JOIN}, {"see": {"role": "listitem"}},
                       {"text": {"role": "listitem"}, "is": "Ada"}, {"see": {"text": "Welcome, Ada"}},
                       {"value": NAME, "is": ""}, {"focus": NAME})),
    PageTest("asks for a name", ({"click": JOIN}, {"see": {"text": "Please give a name"}},
                                 {"count": {"role": "listitem"}, "is": 0})),
    PageTest("keys", ({"tab": [NAME, MAIL, JOIN, CLEAR, {"role": "link", "name": "Back to top"}]},
                      {"named": {"role": "textbox", "name": "E-mail"}})),
    PageTest("side by side", ({"beside": [TITLE, MEMBERS]}, {"apart": [JOIN, CLEAR, MEMBERS]}, {"fits": True},
                              {"size": JOIN, "least": [44, 24]})),
    PageTest("narrow", ({"fits": True}, {"above": [JOIN, MEMBERS]}, {"see": MEMBERS}, {"see": CLEAR}), width=375),
)
# By name: what is replaced by what, the test that fails, and words of what it says.
NEAR_MISSES: dict[str, tuple[str, str, str, str]] = {
    "text_of_background_colour": ("</style>", "#status { color: #fff; }\n</style>", "joins", "cannot be seen"),
    "text_transparent": ("</style>", "#members { opacity: 0; }\n</style>", "joins", "cannot be seen"),
    "covered_by_layer": ("<footer>", '<div style="position:fixed;inset:0;background:#fff;pointer-events:none"></div>'
                         "<footer>", "asks for a name", "cannot be seen"),
    "clicks_do_not_arrive": ("<footer>", '<div style="position:fixed;inset:0"></div><footer>', "joins", "covers it"),
    "handler_on_wrong_element": ("field('join').addEventListener", "field('clear').addEventListener", "joins",
                                 "no listitem"),
    "wide_only": ("flex-wrap: wrap; ", "min-width: 700px; ", "narrow", "wider than the window"),
    "narrow_only": ("section { flex: 1 1 300px;", "section { flex: 1 1 100%;", "side by side", "to the left of"),
    "console_error": ("member.textContent =", "console.error('no such member'); member.textContent =", "joins",
                      "no such member"),
    "throws_afterwards": ("field('name').focus();", "field('name').focus(); undefinedName();", "joins",
                          "undefinedName"),
    "asks_for_missing_file": ("<footer>", '<img src="logo.png" alt=""><footer>', "joins", "logo.png"),
    "focus_lost": ("  field('name').focus();\n", "", "joins", "does not have the focus"),
    "label_missing": ('<label for="mail">', '<label for="email">', "keys", "E-mail"),
    "wrong_tab_order": ('<button id="clear">', '<button id="clear" tabindex="1">', "keys", "in its turn"),
    "button_that_is_none": ('<button id="clear">Clear</button>', '<div id="clear">Clear</div>', "keys", "Clear"),
    "buttons_overlap": ("</style>", "#clear { margin-left: -40px; }\n</style>", "side by side", "overlap"),
    "outside_of_the_screen": ("</style>", "#status { position: absolute; left: -999px; }\n</style>", "joins",
                              "outside of the screen"),
    "accepts_empty_name": ("field('name').value === ''", "field('name').value === ' '", "asks for a name",
                           "no text"),
    "redefines_what_measures": (
        "const field =", "Element.prototype.getBoundingClientRect = () => new DOMRect(0, 0, 99, 99); "
        "document.elementFromPoint = () => document.body; document.body.style.color = '#fff'; const field =", "joins",
        "cannot be seen"),
}


def folder_of(name: str) -> str:
    """Where a copy of the page lies."""
    return f"{name}/index.html"


def files() -> dict[str, str]:
    """A repository with the good page, all copies, and all tests of each, in one file of tests."""
    texts = {folder_of("good"): PAGE}
    for name, (old, new, _, _) in NEAR_MISSES.items():
        assert PAGE.count(old) == 1, name
        texts[folder_of(name)] = PAGE.replace(old, new)
    tests = [dataclasses.replace(test, name=f"{name}: {test.name}", page=page)
             for name, page in ((page.split("/")[0], page) for page in texts) for test in TESTS
             if name == "good" or test.name == NEAR_MISSES[name][2]]
    return texts | {"tests/page.web.json": Suite(tuple(tests)).to_text()}
