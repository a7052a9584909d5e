// Builds a tree of sources with Vite: `node build.mjs`, the request as JSON on standard input, {files} or {fault} on
// standard output. The tree is somebody's whom nobody trusts: Vite has this configuration alone, and code of the tree
// is parsed, never run. What it may import are its own files and vendored modules; nothing is written to disk.
import { lstatSync, readdirSync, readFileSync, realpathSync, statSync } from 'node:fs';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const { tree, site, pages, modules, most, bytes } = JSON.parse(readFileSync(0, 'utf8'));
const ROOT = realpathSync(tree), SITE = path.join(ROOT, site), VENDORED = realpathSync(path.join(modules, 'node_modules'));
const PUBLIC = path.join(SITE, 'public');
const ENDINGS = ['', '.jsx', '.js', '.mjs', '.ts', '.tsx', '.json', '/index.jsx', '/index.js', '/index.ts', '/index.tsx'];
const BUILDERS = ['vite', 'rollup', 'esbuild'];  // are vendored for us, and no module of pages
const NOWHERE = path.join(ROOT, '.env-of-nobody');  // where Vite looks for variables; starting states have no such folder

const sources = new Set();  // files of the tree that the pages are made of
let vite;
let fault = '';  // what our plugin said; others wrap what is thrown, or put their names before it

class Fault extends Error {
  constructor(message) {
    super(message);
    fault ||= message;
  }
}

const within = (place, folder) => place === folder || place.startsWith(folder + path.sep);
const bare = (id) => id.replace(/^\0/, '').replace(/[?#].*$/s, '');
const shown = (place) => path.relative(ROOT, place);

function isFile(place) {
  try {
    return statSync(place).isFile();
  } catch {
    return false;
  }
}

// The line of a file in which a text stands, as ":12"; '' where it does not.
function lineOf(place, text) {
  try {
    const at = readFileSync(place, 'utf8').indexOf(text);
    return at < 0 ? '' : `:${readFileSync(place, 'utf8').slice(0, at).split('\n').length}`;
  } catch {
    return '';
  }
}

// Where a file lies that one of the tree names; links count as what they lead to.
function own(source, importer) {
  const [, name, query] = /^([^?]*)(.*)$/s.exec(source);
  const place = name.startsWith('/') ? path.join(SITE, name) : path.resolve(path.dirname(importer), name);
  for (const ending of ENDINGS) {
    if (within(place + ending, ROOT) && isFile(place + ending)) {
      const real = realpathSync(place + ending);
      if (within(real, ROOT) && !real.split(path.sep).includes('node_modules')) {
        sources.add(shown(real));
        return real + query;
      }
    }
  }
  throw new Fault(`${shown(importer)}${lineOf(importer, source)}: “${source}” is not a file of the tree`);
}

const foreign = (source, from) => new Fault(
  `${shown(from)}${lineOf(from, source)}: “${source}” is neither a file of the tree nor among the vendored modules`);

// JSX in files that end like any script, as many packages have it.
const jsx = {
  name: 'qcn-jsx',
  enforce: 'pre',
  transform(text, id) {
    if (!/\.m?js$/.test(bare(id)) || !within(bare(id), ROOT) || !/<[A-Za-z>]/.test(text)) return null;
    return vite.transformWithEsbuild(text, bare(id), { loader: 'jsx', jsx: 'automatic', tsconfigRaw: '{}' });
  },
};

const guard = {
  name: 'qcn',
  enforce: 'pre',
  async resolveId(source, importer, options) {
    if (!importer || options.isEntry || source.startsWith('\0') || source.startsWith('data:') || source.includes('html-proxy')) return null;
    const from = bare(importer);
    if (!within(from, ROOT)) return null;  // vendored, or Vite's own
    if (/^[a-z][a-z+.-]*:/i.test(source)) throw foreign(source, from);
    if (/^[./]/.test(source)) return own(source, from);
    if (importer.endsWith('.html')) return own(`./${source}`, from);  // an attribute of a page
    const name = source.split('/').slice(0, source.startsWith('@') ? 2 : 1).join('/');
    if (/^(@[\w.-]+\/)?[\w][\w.-]*$/.test(name) && !BUILDERS.includes(name) && isFile(path.join(VENDORED, name, 'package.json'))) {
      const found = await this.resolve(source, path.join(VENDORED, name, 'package.json'), { skipSelf: true });
      if (found && !found.external && within(bare(found.id), VENDORED)) return found;
    }
    throw foreign(source, from);
  },
  load(id) {
    const place = bare(id);
    if (path.isAbsolute(place) && !within(place, ROOT) && !within(place, VENDORED)) throw new Fault(`“${place}” is outside of the tree`);
    return null;
  },
  // Vite resolves what style sheets name on its own.
  transform(text, id) {
    const place = bare(id);
    if (!within(place, ROOT) || !/\.css$/.test(place)) return null;
    for (const [, a, b, c] of text.matchAll(/@import\s+(?:url\(\s*)?["']([^"']+)["']|url\(\s*(?:["']([^"']+)["']|([^"')\s]+))\s*\)/g)) {
      const name = a ?? b ?? c;
      if (!/^(#|[a-z][a-z+.-]*:|\/\/)/i.test(name)) own(a && !/^[./]/.test(a) ? `./${a}` : /^[./]/.test(name) ? name : `./${name}`, place);
    }
    return null;
  },
};

// Files of the folder `public`, which stand beside what is built.
function copied(folder, found = {}) {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const place = path.join(folder, entry.name);
    if (entry.isDirectory()) copied(place, found);
    else if (entry.isFile()) found[path.relative(PUBLIC, place)] = readFileSync(place);
  }
  return found;
}

function isFolder(place) {
  try {
    return lstatSync(place).isDirectory();
  } catch {
    return false;
  }
}

async function built() {
  const input = pages.filter((name) => isFile(path.join(SITE, name)) && within(realpathSync(path.join(SITE, name)), ROOT));
  if (!input.length) throw new Fault(`${pages.join(', ')}: there is no such page`);
  input.forEach((name) => sources.add(path.join(site, name)));
  vite = await import(pathToFileURL(path.join(VENDORED, 'vite/dist/node/index.js')));
  const done = await vite.build({
    configFile: false, envDir: NOWHERE, root: SITE, publicDir: isFolder(PUBLIC) && PUBLIC, mode: 'production', logLevel: 'silent',
    clearScreen: false, appType: 'mpa', server: { fs: { allow: [ROOT] } }, plugins: [guard, jsx], worker: { plugins: () => [guard, jsx] },
    css: { postcss: { plugins: [] } }, esbuild: { jsx: 'automatic', tsconfigRaw: '{}' },
    build: {
      write: false, minify: false, target: 'es2022', modulePreload: { polyfill: false }, reportCompressedSize: false,
      assetsInlineLimit: 0, commonjsOptions: { include: [/.*/], transformMixedEsModules: true },
      rollupOptions: { input: input.map((name) => path.join(SITE, name)), onwarn() {} },
    },
  });
  const files = isFolder(PUBLIC) ? copied(PUBLIC) : {};
  for (const one of done.output) files[one.fileName] = Buffer.from(one.type === 'chunk' ? one.code : one.source);
  return files;
}

// What went wrong in one line, with file and line; files are told as the tree knows them.
function words(error) {
  if (fault) return fault;
  const at = error.loc ?? error.errors?.[0]?.location, file = bare(at?.file ?? error.id ?? '');
  const place = within(file, ROOT) && file !== ROOT ? `${shown(file)}${at?.line ? `:${at.line}` : ''}: ` : '';
  const said = String(error.errors?.[0]?.text ?? error.message ?? error).replaceAll(`${ROOT}/`, '').replaceAll(VENDORED, 'node_modules');
  const line = said.split('\n').map((one) => one.trim()).find(Boolean) ?? 'no reason given';
  const plain = line.replace(/^\[[^\]]*\]\s*/, '').replace(/^\S+ \(\d+:\d+\): /, '');
  return place + (plain.startsWith('Access to this API has been restricted') ? 'names a file outside of the tree' : plain);
}

let reply;
try {
  const files = await built();
  const names = Object.keys(files), total = names.reduce((sum, name) => sum + files[name].length, 0);
  if (names.length > most || total > bytes) throw new Fault(`it makes ${names.length} files of ${total} bytes; at most ${most} files of ${bytes} bytes are taken`);
  reply = { files: Object.fromEntries(names.map((name) => [name, files[name].toString('base64')])), sources: [...sources] };
} catch (error) {
  reply = { fault: words(error) };
}
process.stdout.write(JSON.stringify(reply));
