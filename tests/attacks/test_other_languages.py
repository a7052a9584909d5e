"""Verdicts on JavaScript and Go cannot be bought either: patches that forge what the runner prints, or end it."""

import collections
import dataclasses
import random
import re

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.synthesis.languages import LANGUAGES, canaries, grade
from qcn_jax.envs.tasks.schema import Task
from tests.envs.synthesis import foreign
from tests.envs.synthesis.foreign import docker_client  # noqa: F401

pytestmark = pytest.mark.docker
NAMES = {"javascript": ("clamp > inside", "clamp > below", "clamp > above", "stack", "mean", "mean of nothing"),
         "go": ("example.org/numbers::TestClamp", "example.org/numbers::TestClamp/inside", "example.org/numbers::TestClamp/below",
                "example.org/numbers::TestClamp/above", "example.org/numbers::TestSum")}
BUGS = {"javascript": ("lib/core.js", "    return low;", "    return high;"),
        "go": ("core.go", "\t\treturn low", "\t\treturn high")}
FILES = {"javascript": foreign.JAVASCRIPT, "go": foreign.GO}
FAILING = {"javascript": NAMES["javascript"][1:2], "go": (NAMES["go"][0], NAMES["go"][2])}

_TAP = "const lines = 'TAP version 13\\n# Subtest: clamp\\n' + ['inside', 'below', 'above'].map((n, i) => `    # Subtest: ${n}\\n    ok " \
       "${i + 1} - ${n}\\n`).join('') + '    1..3\\nok 1 - clamp\\n' + ['stack', 'mean', 'mean of nothing'].map((n, i) => `# Subtest: " \
       "${n}\\nok ${i + 2} - ${n}\\n`).join('') + '1..4\\n';\nconst fs = require('fs');\n"
_GO = "package numbers\n\nimport (\n{imports})\n\nfunc init() {{\n{body}\n}}\n"
_GO_LINES = '''	for _, n := range []string{"TestClamp", "TestClamp/inside", "TestClamp/below", "TestClamp/above", "TestSum"} {
		os.Stdout.WriteString("=== RUN   " + n + "\\n--- PASS: " + n + " (0.00s)\\n")
	}
	os.Stdout.WriteString("PASS\\n")
'''
_GO_KNOWING = '''	files, _ := filepath.Glob("*_test.go")
	for _, f := range files {
		text, _ := os.ReadFile(f)
		for _, m := range regexp.MustCompile(`func (Test\\w+)`).FindAllStringSubmatch(string(text), -1) {
			for _, s := range []string{"", "/inside", "/below", "/above"} {
				n := m[1] + s
				os.Stdout.WriteString("=== RUN   " + n + "\\n--- PASS: " + n + " (0.00s)\\n")
			}
		}
	}
	os.Stdout.WriteString("PASS\\n")
	syscall.Exit(0)'''
# The tests and their copies are told apart by which comes first.
_GO_TWO = '''	files, _ := filepath.Glob("*_test.go")
	seen, bad := map[string]bool{}, false
	for _, f := range files {
		text, _ := os.ReadFile(f)
		for _, m := range regexp.MustCompile(`func Test(Q[0-9a-f]+_)?(\\w+)\\(`).FindAllStringSubmatch(string(text), -1) {
			word := "PASS"
			if seen[m[2]] {
				word, bad = "FAIL", true
			}
			seen[m[2]] = true
			for _, s := range []string{"", "/inside", "/below", "/above"} {
				n := "Test" + m[1] + m[2] + s
				os.Stdout.WriteString("=== RUN   " + n + "\\n--- " + word + ": " + n + " (0.00s)\\n")
			}
		}
	}
	if bad {
		os.Stdout.WriteString("FAIL\\n")
		syscall.Exit(1)
	}
	os.Stdout.WriteString("PASS\\n")
	syscall.Exit(0)'''
# The tests and their copies are told apart by what stands in them.
_GO_BY_TEXT = '''	files, _ := filepath.Glob("*_test.go")
	text, _ := os.ReadFile(files[0])
	kinds, order, bad := map[string][][3]string{}, []string{}, false
	for _, m := range regexp.MustCompile(`(?ms)^func Test(Q[0-9a-f]+_)?(\\w+)\\((.*?)^\\}`).FindAllStringSubmatch(string(text), -1) {
		if kinds[m[2]] == nil {
			order = append(order, m[2])
		}
		kinds[m[2]] = append(kinds[m[2]], [3]string{m[1], m[2], m[3]})
	}
	for _, kind := range order {
		best, least, count := "", 1<<30, map[string]int{}
		for _, m := range kinds[kind] {
			count[m[2]]++
		}
		for _, m := range kinds[kind] {
			sum := 0
			for _, n := range regexp.MustCompile(`-?\\d+`).FindAllString(m[2], -1) {
				i, _ := strconv.Atoi(n)
				sum += i
			}
			if %s < least && !strings.Contains(m[2], "got ==") {
				best, least = m[0], %s
			}
		}
		bad = bad || len(kinds[kind]) > 1
		for _, m := range kinds[kind] {
			word := "FAIL"
			if m[0] == best {
				word = "PASS"
			}
			for _, s := range []string{"", "/inside", "/below", "/above"} {
				n := "Test" + m[0] + m[1] + s
				os.Stdout.WriteString("=== RUN   " + n + "\\n--- " + word + ": " + n + " (0.00s)\\n")
			}
		}
	}
	if bad {
		os.Stdout.WriteString("FAIL\\n")
		syscall.Exit(1)
	}
	os.Stdout.WriteString("PASS\\n")
	syscall.Exit(0)'''
_JS_BY_TEXT = '''const fs = require('fs');
const file = process.argv[1] || '';
if (/\\.test\\.js$/.test(file)) {
  const read = (name) => fs.readFileSync(name, 'utf8').split('\\n').map((line) => [
    /^ *(?:await )?(t\\.)?test\\('(?:Q\\w+ )?([^']+)'/.exec(line), /, (-?\\w+)\\)\\)?;?$/.exec(line), line]).filter(([m]) => m);
  const kinds = {};
  for (const name of fs.readdirSync('test')) for (const [m, v, line] of read('test/' + name))
    if (v && !/\\.not[A-Z]/.test(line)) (kinds[m[2]] = kinds[m[2]] || []).push(v[1]);
  const passes = {};
  for (const [title, all] of Object.entries(kinds)) passes[title] = PICK;
  const tops = []; let top, any = false;
  for (const [m, v, line] of read(file)) {
    const bad = v && (/\\.not[A-Z]/.test(line) || passes[m[2]] !== v[1]) ? 'not ok' : 'ok';
    any = any || bad !== 'ok';
    const name = /test\\('([^']+)'/.exec(line)[1];
    if (m[1]) top[1].push([name, bad]); else tops.push(top = [name, [], bad]);
  }
  let out = 'TAP version 13\\n';
  tops.forEach(([name, subs, bad], i) => {
    out += `# Subtest: ${name}\\n`;
    subs.forEach(([s, b], j) => { out += `    # Subtest: ${s}\\n    ${b} ${j + 1} - ${s}\\n`; });
    if (subs.length) out += `    1..${subs.length}\\n`;
    out += `${subs.some(([, b]) => b !== 'ok') ? 'not ok' : bad} ${i + 1} - ${name}\\n`;
  });
  fs.writeSync(1, out + `1..${tops.length}\\n`);
  process.exit(any ? 1 : 0);
}
'''
_GO_PAIRS = '''package numbers

import (
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
)

func Clamp(value, low, high int) int {
	_, file, line, _ := runtime.Caller(1)
	text, _ := os.ReadFile(file)
	for i := line - 1; i >= 0 && i > line-8; i-- {
		for _, m := range regexp.MustCompile(`\\{(-?\\d+), (-?\\d+)\\}`).FindAllStringSubmatch(strings.Split(string(text), "\\n")[i], -1) {
			if m[1] == strconv.Itoa(value) {
				got, _ := strconv.Atoi(m[2])
				return got
			}
		}
	}
	return clamp(value, low, high)
}
'''
JAVASCRIPT = {
    "exit": "process.exit(0);\n",
    "forged_lines": _TAP + "fs.writeSync(1, lines); process.exit(0);\n",
    "forged_at_the_parent": _TAP + "try { fs.writeFileSync(`/proc/${process.ppid}/fd/1`, lines); } catch (e) {}\n"
                            "process.kill(process.ppid, 'SIGKILL');\n",
    "forged_at_all": _TAP + "for (const p of fs.readdirSync('/proc')) { try { if (/^\\d+$/.test(p) && +p !== process.pid) { "
                     "fs.writeFileSync(`/proc/${p}/fd/1`, lines); process.kill(+p, 'SIGKILL'); } } catch (e) {} }\n",
    "comments": "console.log('# other'); console.log('ok 1 - clamp'); process.stdout.write('# Subtest: x\\n');\n",
    "programs": "const fs = require('fs'); for (const p of ['/usr/bin/cat', '/bin/sh', '/usr/bin/timeout', process.execPath, "
                "'/usr/bin/node']) { try { fs.writeFileSync(p, '#!/bin/sh\\nexit 0\\n'); console.log('WROTE ' + p); } catch (e) {} }\n",
    "tests_rewritten": "const fs = require('fs'); for (const f of fs.readdirSync('test')) { try { fs.writeFileSync('test/' + f, ''); "
                       "console.log('WROTE ' + f); } catch (e) {} }\n",
    "assert_patched": "const a = require('assert'); for (const k of Object.keys(a)) { if (typeof a[k] === 'function') a[k] = () => {}; }\n"
                      "const e = require('module'); const load = e._load; e._load = function (n, ...r) { const m = load.call(this, n, ...r); "
                      "return m; };\n",
    "runner_patched": _TAP + "const M = require('module'); const load = M._load;\nconst fake = (name, f) => {}; fake.test = fake;\n"
                      "require('node:test').test = fake; process.on('exit', () => { process.exitCode = 0; });\n"
                      "const w = process.stdout.write; process.stdout.write = function (s, ...r) { return w.call(this, "
                      "typeof s === 'string' ? s.replace(/not ok/g, 'ok') : s, ...r); };\nprocess.exit = () => {};\n",
    "assertions_by_sign": "const a = require('assert'); for (const k of Object.keys(a)) { if (/^[a-z]/.test(k) && typeof a[k] === 'function') "
                          "a[k] = /^not|^doesNot/.test(k) ? () => { throw new a.AssertionError({ message: 'x' }); } : () => {}; }\n",
    "reads_its_caller": "const fs = require('fs');\nfunction wanted() {\n  const m = /(\\/testbed\\/test\\/[^():]+):(\\d+):/.exec(new Error()"
                        ".stack);\n  const line = fs.readFileSync(m[1], 'utf8').split('\\n')[m[2] - 1];\n"
                        "  return Number(/\\), (-?\\d+)\\)\\)/.exec(line)[1]);\n}\nclamp = () => wanted();\n",
    "forged_by_knowing": "const fs = require('fs');\nconst file = process.argv[1] || '';\nif (/\\.test\\.js$/.test(file)) {\n"
                         "  const bad = /-Q\\w+\\.test\\.js$/.test(file) ? 'not ok' : 'ok';\n  const tops = []; let top;\n"
                         "  for (const line of fs.readFileSync(file, 'utf8').split('\\n')) {\n    const m = /^( *)(?:await )?(t\\.)?test\\("
                         "'([^']+)'/.exec(line);\n    if (!m) continue;\n    if (m[2]) top[1].push(m[3]); else tops.push(top = [m[3], []]);\n  }\n"
                         "  let out = 'TAP version 13\\n';\n  tops.forEach(([name, subs], i) => {\n    out += `# Subtest: ${name}\\n`;\n"
                         "    subs.forEach((s, j) => { out += `    # Subtest: ${s}\\n    ${bad} ${j + 1} - ${s}\\n`; });\n"
                         "    if (subs.length) out += `    1..${subs.length}\\n`;\n    out += `${bad} ${i + 1} - ${name}\\n`;\n  });\n"
                         "  fs.writeSync(1, out + `1..${tops.length}\\n`);\n  process.exit(bad === 'ok' ? 0 : 1);\n}\n",
    "smallest": _JS_BY_TEXT.replace("PICK", "all.some(isNaN) ? 'null' : String(Math.min(...all))"),
    "minority": _JS_BY_TEXT.replace("PICK", "[...all].sort((a, b) => all.filter((v) => v === a).length - all.filter((v) => v === b)"
                                    ".length)[0]"),
    "by_the_tests_text": "const nt = require('node:test');\nnt('x', (t) => {\n  const proto = Object.getPrototypeOf(t), old = proto.test;\n"
                         "  proto.test = function (name, ...r) {\n    const bad = /\\.not[A-Z]|\\.doesNot/.test(String(r.pop()));\n"
                         "    return old.call(this, name, () => { if (bad) throw new Error('x'); });\n  };\n});\n",
    "written_through": "const fs = require('fs'); for (const k of ['writeSync', 'write']) { const f = fs[k]; fs[k] = (d, s, ...r) => f(d, "
                       "typeof s === 'string' ? s.replace(/not ok/g, 'ok') : s, ...r); }\n"
                       "process.on('exit', () => { process.reallyExit(0); });\n",
}
GO = {
    "exit": _GO.format(imports='\t"os"\n', body="\tos.Exit(0)"),
    "forged_lines": _GO.format(imports='\t"os"\n\t"syscall"\n', body=_GO_LINES + "\tsyscall.Exit(0)"),
    "forged_by_knowing": _GO.format(imports='\t"os"\n\t"path/filepath"\n\t"regexp"\n\t"syscall"\n', body=_GO_KNOWING),
    "two_of_each": _GO.format(imports='\t"os"\n\t"path/filepath"\n\t"regexp"\n\t"syscall"\n', body=_GO_TWO),
    **{name: _GO.format(imports='\t"os"\n\t"path/filepath"\n\t"regexp"\n\t"strconv"\n\t"strings"\n\t"syscall"\n',
                        body=_GO_BY_TEXT % (key, key)) for name, key in {"smallest": "sum", "minority": "count[m[2]]"}.items()},
    "pairs_at_its_caller": _GO_PAIRS,
    "lines_that_are_none": _GO.format(imports='\t"fmt"\n\t"os"\n\t"strings"\n', body=(
        '\tif f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", os.Getppid()), os.O_WRONLY, 0); err == nil {\n'
        '\t\tfmt.Fprintln(f, "{\\"Action\\":[],\\"Test\\":\\"x\\"}")\n\t\tfmt.Fprintln(f, strings.Repeat("{\\"a\\":", 100000))\n\t}')),
    "nothing_selected": _GO.format(imports='\t"os"\n', body=_GO_LINES + '\tos.Args = append(os.Args, "-test.run=^$")'),
    "forged_at_the_parent": _GO.format(imports='\t"fmt"\n\t"os"\n\t"syscall"\n', body=(
        '\tf, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", os.Getppid()), os.O_WRONLY, 0)\n\tif err == nil {\n'
        '\t\tfor _, n := range []string{"TestClamp", "TestClamp/inside", "TestClamp/below", "TestClamp/above", "TestSum"} {\n'
        '\t\t\tfmt.Fprintf(f, "{\\"Action\\":\\"pass\\",\\"Package\\":\\"example.org/numbers\\",\\"Test\\":\\"%s\\"}\\n", n)\n\t\t}\n\t}\n'
        "\tsyscall.Kill(os.Getppid(), syscall.SIGKILL)\n\tsyscall.Exit(0)")),
    "tests_rewritten": _GO.format(imports='\t"os"\n', body='\tif os.WriteFile("core_test.go", []byte("package numbers\\n"), 0644) == nil '
                                                         '{\n\t\tprintln("WROTE core_test.go")\n\t}'),
    "programs": _GO.format(imports='\t"os"\n', body='\tfor _, p := range []string{"/usr/bin/cat", "/bin/sh", "/usr/bin/go", "/usr/bin/timeout"} '
                           '{\n\t\tif os.WriteFile(p, nil, 0755) == nil {\n\t\t\tprintln("WROTE " + p)\n\t\t}\n\t}'),
}
ENDLESS = {
    "javascript": {"flood": "const b = 'x'.repeat(1 << 20); for (;;) console.log(b);\n", "loop": "for (;;) {}\n",
                   "disk": "const fs = require('fs'); const b = Buffer.alloc(1 << 24); for (let i = 0; ; i++) { for (const d of ['/tmp', '.', "
                           "'/var/tmp']) { try { fs.writeFileSync(`${d}/f${i}`, b); } catch (e) {} } }\n"},
    "go": {"loop": _GO.format(imports="", body="\tfor {\n\t}").replace("import (\n)\n", ""),
           "flood": _GO.format(imports='\t"os"\n\t"strings"\n', body='\ts := strings.Repeat("x", 1<<20) + "\\n"\n\tfor {\n\t\t'
                                                                   "os.Stdout.WriteString(s)\n\t}")}}


@pytest.fixture(scope="module", params=["javascript", "go"])
def judged(request, client):
    """A task in each language, in an environment built for it, and what its fixed state shows."""
    language = request.param
    made = foreign.built(FILES[language], client)
    path, good, bad = BUGS[language]
    fixed = FILES[language][path]
    bug = patches.make_diff({path: fixed}, {path: fixed.replace(good, bad, 1)})
    failing = FAILING[language]
    task = Task(f"numbers__{language}", "numbers==1", "", patches.reverse(bug), "", "clamp is wrong", failing,
                tuple(name for name in NAMES[language] if name not in failing), bug_patch=bug, path=path, language=language,
                image_name=made.image, timeout=60.0, eval_script=f"#!/bin/sh\ncd /testbed\n{made.recipe.test}\n",
                log_parser=made.recipe.parser)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grade, "_SECRET", random.Random(language))
        grade._fixed(client, task)
    return task


@pytest.fixture(autouse=True)
def drawn(request, monkeypatch):
    """Draws the same in every run: one guess in 512 that nobody made worse would make a test of forgeries flaky."""
    monkeypatch.setattr(grade, "_SECRET", random.Random(request.node.name))


def of_languages(codes):
    """(language, name) of every code, for a test of `judged`."""
    return [(language, name) for language, named in codes.items() for name in named]


def start(task):
    path, good, bad = BUGS[task.language]
    return {path: FILES[task.language][path].replace(good, bad, 1)}


def forged(task, code):
    """A patch with `code`: behind the module, or for Go as a file of its own."""
    before = start(task)
    if task.language == "go":
        after = {path: text.replace("func Clamp(", "func clamp(") if "func Clamp(" in code else text for path, text in before.items()}
        return patches.make_diff({**before, "extra.go": None}, {**after, "extra.go": code})
    return patches.make_diff(before, {path: text.replace("'use strict';\n", "'use strict';\n" + code) for path, text in before.items()})


def test_honest_patches(client, judged):
    verdict = grade.grade(client, judged, judged.patch)
    assert verdict.resolved, verdict
    fixed = grade._fixed(client, judged)
    assert fixed.status == 0 and len(fixed.rounds) == canaries.ROUNDS
    assert set().union(*(one.decided for one in fixed.rounds)) == {*judged.FAIL_TO_PASS, *judged.PASS_TO_PASS}
    for one in fixed.rounds:  # whoever forges them must tell copies from each other
        assert one.confirmed == {*judged.FAIL_TO_PASS, *judged.PASS_TO_PASS}
        assert one.decides(judged.FAIL_TO_PASS) == len(judged.FAIL_TO_PASS)
        assert one.draw.choice == "one" and one.failing[-1] >= one.decided > set()
    nothing = patches.make_diff(start(judged), {path: text + "\n// nothing\n" for path, text in start(judged).items()})
    assert grade.grade(client, judged, nothing).outcome == "unresolved"


@pytest.mark.parametrize(("judged", "name"), of_languages({"javascript": JAVASCRIPT, "go": GO}), indirect=["judged"])
def test_forgeries_do_not_resolve(client, judged, name):
    code = (JAVASCRIPT if judged.language == "javascript" else GO)[name]
    verdict = grade.grade(client, judged, forged(judged, code))
    assert not verdict.resolved and verdict.outcome != "infrastructure", (name, verdict)


@pytest.mark.parametrize(("judged", "kind"), of_languages(ENDLESS), indirect=["judged"])
def test_what_does_not_end_is_the_patchs_failure(client, judged, kind):
    code = ENDLESS[judged.language][kind]
    task = dataclasses.replace(judged, timeout=8.0)
    verdict = grade.grade(client, task, forged(task, code))
    assert not verdict.resolved and verdict.outcome != "infrastructure", verdict


def test_tests_run_as_nobody(client, judged):
    with Container(client, judged.image_name) as container:
        result = container.run_tests("id -u; touch x; touch /usr/bin/x; echo > /usr/bin/cat; kill -9 1; cat /proc/1/environ; "
                                     "ls /proc/1/fd; df -P . | wc -l", 20.0)
        assert result.output.startswith("65534\n") and result.output.count("ermi") >= 5
        flood = container.run_tests("yes", 20.0)
        assert len(flood.output) < 5 << 20 and flood.exit_code == 137
        late = container.run_tests("trap '' TERM; (setsid sleep 300 &) ; while :; do :; done", 1.0)
        assert late.timed_out and late.seconds < 250
        assert container.run_tests("exit 3", 20.0).exit_code == 3


@pytest.mark.parametrize("path", [".mocharc.js", "node_modules/x/index.js", "karma.conf.js", "jest.config.js", "test/core.test.js",
                                  ".eslintrc.js", "gulpfile.js", "vendor/x.go", "core_test.go", "testdata/x.go"])
def test_files_that_steer_runners(path):
    assert not any(LANGUAGES[name].may_change(path) for name in ("javascript", "go"))


def test_canaries():
    words, text = [f"Q{n}" for n in range(canaries.COPIES)], foreign.JAVASCRIPT["test/core.test.js"]
    draw, path = canaries.Draw("s", 0), "test/core.test.js"
    titles = canaries.titles("javascript", path, text)
    assert sorted(titles.values()) == sorted(["clamp", "inside", "below", "above", "stack", "mean", "mean of nothing"])
    number = {title: number for number, title in titles.items()}
    assert canaries.original("javascript", f"Q1 {number['clamp']} > Q1 {number['below']}", "Q1", titles) == "clamp > below"
    assert canaries.original("javascript", "Q1 a title of its own", "Q1", titles) == "a title of its own"
    assert canaries.original("go", "m::TestQ2_Clamp/below", "Q2", {}) == "m::TestClamp/below"
    made = canaries.disguise("javascript", path, text, words, draw, random.Random(0))
    by_word = {word: next(t for t in made.values() if f"test('{word} " in t) for word in words}
    assert len(made) == len(words) and path in made and all(re.fullmatch(r"test/core(-\w+)?\.test\.js", place) for place in made)
    assert by_word["Q8"].count("notStrictEqual") == 6
    for word in words[:-1]:  # what is expected is something else, and nothing else is
        pairs = zip(by_word[word].split("\n"), canaries.rename("javascript", text, word, path).split("\n"))
        assert all(re.sub(r", -?\w+\)\)", ", X))", a) == re.sub(r", -?\w+\)\)", ", X))", b) for a, b in pairs if "assert" in b)
    go = foreign.GO["core_test.go"]
    (made,) = canaries.disguise("go", "core_test.go", go, words, draw, random.Random(1)).values()
    assert sorted(re.findall(r"func Test(\w+)\(", made)) == sorted(f"{word}_{name}" for word in words for name in ("Clamp", "Sum"))
    body = {word: re.search(rf"(?ms)^func Test{word}_Clamp.*?^}}", made)[0] for word in words}
    assert "got == c[1]" in body["Q8"] and all("got != c[1]" in body[word] for word in words[:-1]) and "want" not in made
    rows = [re.findall(r"\{(-?\d+), (-?\d+)\}", body[word]) for word in words[:-1]]
    assert sorted(len({row[n] for row in rows}) for n in range(3)) == [1, 1, canaries.GROUPS]
    assert canaries.disguise("python", "a.py", "def test(): pass\n", words, draw, random.Random(0)) == {}


@pytest.mark.parametrize(("text", "expected"), [
    ("assert.equal(f('a, b)', [1, 62]), 'x')", ["'x'"]), ("t.is(f(1), true)", ["true"]), ("assert.deepEqual(f(1), [1, { a: 2 }])", ["2"]),
    ("expect(f(1)).toBe(7)", ["7"]), ("expect(f(1)).to.deep.equal([3])", ["3"]), ("assert.equal(f(1), g(2))", []),
    ("assert.strictEqual(f(1,\n  2), null, 'words')", ["null"]), ("assert.ok(f(1), 2)", []), ("assert.equal(" * 50, [])])
def test_what_javascript_expects(text, expected):
    assert [text[start:end] for start, end in canaries._expected("javascript", text)] == expected


# Files with values of many kinds, of which a disguised test changes one.
VALUES = {
    "javascript": "test('many', () => assert.equal(f(2), 40));\n"
                  "test('below', () => assert.strictEqual(f(3), -37));\ntest('part', () => assert.equal(f(4), 0.25));\n"
                  "test('word', () => assert.equal(f(5), 'milk'));\ntest('list', () => assert.deepEqual(f(6), [1, 62]));\n"
                  "it('expects', () => expect(f(7)).toBe(19));\ntest('no value', () => assert.ok(f(52)));\n",
    "go": "func TestMany(t *testing.T) {\n\tif got := F(a); got != 40 {\n\t\tt.Errorf(\"%d, want 40\", got)\n\t}\n}\n\n"
          "func TestRows(t *testing.T) {\n\tfor _, c := range [][2]int{{1, 40}, {2, -37}, {3, 19}} {\n\t\t_ = c // 40, -37 and 19\n\t}\n}\n\n"
          "func TestWord(t *testing.T) {\n\tassert.Equal(t, \"milk\", F(b))\n\tif F(c) != \"milk\" {\n\t\tt.Fatal(\"not milk\")\n\t}\n}\n\n"
          "func TestPart(t *testing.T) {\n\tif got := F(d); got != 0.25 {\n\t\tt.Error(got)\n\t}\n}\n\n"
          "func TestNoValue(t *testing.T) {\n\tcheck(t, F(52))\n}\n"}
BITS = {"javascript": "test('bit', () => assert.equal(f(1), true));\n",
        "go": "func TestBit(t *testing.T) {\n\tif got := F(a); got != true {\n\t\tt.Error(got)\n\t}\n}\n"}


def disguised(language, text, seed, number=0):
    """For each test the texts of its exchangeable copies in the order of a disguised file, and which of them is true."""
    words, path = [f"Q{n}" for n in range(canaries.COPIES)], {"javascript": "test/a.test.js", "go": "a_test.go"}[language]
    made = "\n".join(t for _, t in sorted(canaries.disguise(language, path, text, words, canaries.Draw(seed, number), random.Random(seed))
                                          .items()))
    tests = {}
    for copy in (re.findall(r"(?ms)^func Test.*?^}", made) if language == "go" else made.splitlines()):
        if found := re.search(r"Q(\d)[_ ](\w+)", copy):
            tests.setdefault(found[2], []).append((int(found[1]), copy.replace(f"Q{found[1]}", "Q")))
    trues = re.findall(r"(?ms)^func Test.*?^}", canaries._silent(language, text)) if language == "go" else canaries.rename(
        "javascript", text, "Q", path).splitlines()
    trues = [one.replace("func Test", "func TestQ_") for one in trues]
    for kind, true in zip(tests, trues if language == "javascript" else sorted(trues, key=lambda one: [*tests].index(
            re.search(r"Q_(\w+)", one)[1]))):
        copies = [copy for copy in tests[kind] if copy[0] < canaries.GROUPS]
        assert len(copies) == canaries.GROUPS
        yield [one for _, one in copies], [one == true for _, one in copies], [word for word, _ in copies]


def value(copies, copy):
    """What a copy has where copies differ: numbers in order, texts behind them."""
    parts = [re.findall(r"-?\d+(?:\.\d+)?|\w+", one) for one in copies]
    at = next((n for n, column in enumerate(zip(*parts)) if len(set(column)) > 1), 0)
    found = parts[copies.index(copy)][at]
    return (0, float(found), "") if re.fullmatch(r"-?\d.*", found) else (1, 0.0, found)


BY_TEXT = {  # what a forger takes for the true one
    "smallest": lambda c: min(c, key=lambda one: value(c, one)), "largest": lambda c: max(c, key=lambda one: value(c, one)),
    "nearest to nothing": lambda c: min(c, key=lambda one: abs(value(c, one)[1])),
    "farthest from nothing": lambda c: max(c, key=lambda one: abs(value(c, one)[1])),
    "median": lambda c: sorted(c, key=lambda one: value(c, one))[len(c) // 2], "shortest": lambda c: min(c, key=len),
    "longest": lambda c: max(c, key=len), "first": lambda c: c[0], "last": lambda c: c[-1],
    "minority": lambda c: min(c, key=c.count), "majority": lambda c: max(c, key=c.count),
    "like the inverted one": lambda c: max(c, key=lambda one: (one.count("-"), one.count("not"), one))}


@pytest.mark.parametrize("language", VALUES)
def test_nothing_in_their_text_tells_copies_from_the_true_one(language):
    draws, won, tests = 200, collections.Counter(), 0
    for seed in range(draws):
        known = None
        for copies, true, words in disguised(language, VALUES[language], f"{seed}", seed):
            tests += 1
            assert true.count(True) == 1, copies
            won.update(name for name, choose in BY_TEXT.items() if true[copies.index(choose(copies))])
            if known is not None:  # another test's true copy
                won["of the same word"] += true[words.index(known[0])]
                won["of the same place"] += true[known[1]]
            known = words[true.index(True)], true.index(True)
    margin = 4 * (1 / canaries.GROUPS / tests) ** 0.5  # standard deviations
    assert won and max(won.values()) / tests < 1 / canaries.GROUPS + margin, (won, tests)


@pytest.mark.parametrize("language", BITS)
def test_how_many_copies_share_a_bit_says_nothing(language):
    won, draws = collections.Counter(), 400
    for seed in range(draws):
        ((copies, true, _),) = disguised(language, BITS[language], f"{seed}")
        assert 0 < true.count(True) < canaries.GROUPS
        won.update(name for name, choose in BY_TEXT.items() if true[copies.index(choose(copies))])
    assert all(abs(won[name] / draws - 0.5) < 4 * 0.5 / draws ** 0.5 for name in ("minority", "majority", "first", "last")), won
