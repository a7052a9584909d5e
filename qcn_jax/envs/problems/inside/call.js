// Calls a function of answer.js as standard input says, and writes what it gave as one line of JSON.
const fs = require("fs");
const asked = JSON.parse(fs.readFileSync(0, "utf8"));
for (const name of ["log", "info", "debug"]) console[name] = console.error;
let said;
try {
  const module = { exports: {} };
  const source = fs.readFileSync(__dirname + "/answer.js", "utf8");
  const get = `;return typeof ${asked.function} === "function" ? ${asked.function} : module.exports[${JSON.stringify(asked.function)}];`;
  const found = new Function("module", "exports", "require", source + "\n" + get)(module, module.exports, require);
  const value = found(...asked.args);
  said = { value: value === undefined ? null : value };
} catch (error) {
  said = { raised: [error && error.name ? error.name : "Error", "Error"] };
}
fs.writeSync(1, JSON.stringify(said) + "\n");
