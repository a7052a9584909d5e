"""Small JavaScript, Go and Python repositories for tests of environments and of other languages, and what builds them."""

import pytest

from qcn_jax.envs.synthesis import build
from qcn_jax.envs.synthesis.build.container import engine
from qcn_jax.errors import UserError

JAVASCRIPT = {
    "package.json": '{"name": "numbers", "version": "1.0.0", "scripts": {"test": "eslint . && node --test test/"}}\n',
    "lib/core.js": """'use strict';

function clamp(value, low, high) {
  if (value < low) {
    return low;
  }
  if (value > high) {
    return high;
  }
  return value;
}

class Stack {
  constructor() {
    this.items = [];
  }

  push(item) {
    this.items.push(item);
    return this.items.length;
  }
}

const mean = (values) => values.length === 0 ? null : values.reduce((a, b) => a + b, 0) / values.length;

function unused(a, b) {
  return a - b;
}

module.exports = { clamp, Stack, mean, unused };
""",
    "test/core.test.js": """'use strict';
const test = require('node:test');
const assert = require('node:assert');
const { clamp, Stack, mean } = require('../lib/core.js');

console.log('printed by an innocent file');
test('clamp', async (t) => {
  console.log('# printed beside subtests');
  await t.test('inside', () => assert.strictEqual(clamp(5, 0, 10), 5));
  await t.test('below', () => assert.strictEqual(clamp(-5, 0, 10), 0));
  await t.test('above', () => assert.strictEqual(clamp(50, 0, 10), 10));
});
test('stack', () => console.log('not ok') || assert.strictEqual(new Stack().push(1), 1));
test('mean', () => assert.strictEqual(mean([1, 2, 3]), 2));
test('mean of nothing', () => assert.strictEqual(mean([]), null));
""",
}
GO = {
    "go.mod": "module example.org/numbers\n\ngo 1.19\n",
    "core.go": """package numbers

// Clamp keeps value between low and high.
func Clamp(value, low, high int) int {
	if value < low {
		return low
	}
	if value > high {
		return high
	}
	return value
}

// Sum adds.
func Sum(values []int) int {
	total := 0
	for _, value := range values {
		total += value
	}
	return total
}

// Unused is not tested.
func Unused(a, b int) int {
	return a - b
}
""",
    "core_test.go": """package numbers

import (
	"fmt"
	"testing"
)

func TestClamp(t *testing.T) {
	for name, c := range map[string][2]int{"inside": {5, 5}, "below": {-5, 0}, "above": {50, 10}} {
		t.Run(name, func(t *testing.T) {
			if got := Clamp(c[0], 0, 10); got != c[1] {
				t.Errorf("Clamp(%d, 0, 10) = %d, want %d", c[0], got, c[1])
			}
		})
	}
}

func TestSum(t *testing.T) {
	fmt.Print("printed without an end")
	if got := Sum([]int{1, 2, 3}); got != 6 {
		t.Errorf("Sum = %d, want 6", got)
	}
}
""",
}
PYTHON = {
    "calc/__init__.py": "",
    "calc/core.py": 'def clamp(value, low, high):\n    """Bounds."""\n    if value < low:\n        return low\n'
                    "    return high if value > high else value\n",
    "checks/run_checks.py": "import sys\n\nfrom calc.core import clamp\n\nCASES = {'inside': (5, 5), 'below': (-5, 0), "
                            "'above': (50, 10)}\nbad = 0\nfor number, (name, (given, wanted)) in enumerate(CASES.items(), 1):\n"
                            "    good = clamp(given, 0, 10) == wanted\n    bad += not good\n"
                            "    print('ok' if good else 'not ok', number, '-', name)\nsys.exit(bad)\n",
}  # fmt: skip


def encoded(files):
    """The files as bytes."""
    return {path: text.encode() for path, text in files.items()}


@pytest.fixture(scope="module", name="client")
def docker_client():
    """The Docker engine; tests that take it are marked `docker`."""
    return engine()


def built(files, client):
    """The environment that rules build for `files`; skips where no package mirror is reached."""
    try:
        return build.build(encoded(files), "numbers", lambda _: None, client=client)
    except UserError as error:
        if "Debian packages cannot be installed" in str(error):
            pytest.skip(str(error))
        raise
