// Drives Chromium through the tests of a page, from outside of the page: `node driver.mjs PLAYWRIGHT DESCRIPTOR`, the
// request as JSON on standard input, one JSON object a line on the descriptor. The page's code runs in Chromium's renderer, which
// has neither; elements are found and measured in a world of their own (content scripts), where nothing that the page
// redefines has an effect, and what can be seen is read from pixels.
import { createRequire } from 'node:module';
import { closeSync, openSync, readFileSync, readSync, realpathSync, statSync, writeSync } from 'node:fs';
import path from 'node:path';
import { contentEngine, Failure, isAction, runStep } from './steps.mjs';
import { survey } from './survey.mjs';

const require = createRequire(import.meta.url);
const { chromium, selectors } = require(process.argv[2]);
const { PNG } = require(path.join(process.argv[2], 'lib', 'utilsBundle.js'));

const HEIGHT = 800;
const MOVEMENTS = 8;  // that may follow from each other
const NOON = new Date('2024-05-15T12:00:00Z');  // the clock of every page, so that what it shows is the same each day
const TYPES = {
  '.html': 'text/html; charset=utf-8', '.js': 'text/javascript; charset=utf-8', '.mjs': 'text/javascript; charset=utf-8',
  '.css': 'text/css; charset=utf-8', '.json': 'application/json', '.svg': 'image/svg+xml', '.png': 'image/png',
  '.jpg': 'image/jpeg', '.gif': 'image/gif', '.webp': 'image/webp', '.ico': 'image/x-icon', '.woff2': 'font/woff2',
  '.txt': 'text/plain; charset=utf-8',
};

function read() {
  const parts = [], buffer = Buffer.alloc(1 << 16);
  for (let size; (size = readSync(0, buffer, 0, buffer.length, null)) > 0;) parts.push(Buffer.from(buffer.subarray(0, size)));
  return JSON.parse(Buffer.concat(parts).toString('utf8'));
}

// Opened anew, so that nothing that is started from here gets it.
const results = openSync(`/proc/self/fd/${process.argv[3]}`, 'w');
closeSync(Number(process.argv[3]));

function tell(row) {
  const data = Buffer.from(JSON.stringify(row) + '\n');
  for (let at = 0; at < data.length;) at += writeSync(results, data, at);
}

// The name and the bytes of what a page asks for; null where it is not built, outside of its folder or a test.
function fileOf(site, url, { hidden, built }) {
  const name = decodeURIComponent(new URL(url).pathname).replace(/\/$/, '/index.html').slice(1);
  if (built) return Object.hasOwn(built, name) ? { name, body: Buffer.from(built[name], 'base64') } : null;
  const place = path.join(site, name);
  try {
    const real = realpathSync(place);
    const inside = path.relative(realpathSync(site), real);
    if (inside.startsWith('..') || path.isAbsolute(inside) || hidden.includes(inside) || !statSync(real).isFile()) return null;
    served.add(path.relative(realpathSync(request.root), real));
    return { name: real, body: readFileSync(real) };
  } catch {
    return null;
  }
}

class Session {
  constructor(request) {
    this.request = request;
    this.site = path.resolve(request.root, request.site);
    this.errors = [];
    this.open = 0;
    this.number = 0;
  }

  async start() {
    await selectors.register('qcn', contentEngine, { contentScript: true });
    this.browser = await chromium.launch({
      executablePath: this.request.chromium, chromiumSandbox: false, timeout: 0,
      args: ['--disable-gpu', '--no-zygote', '--disable-dev-shm-usage', '--force-color-profile=srgb',
        '--font-render-hinting=none', '--js-flags=--max-old-space-size=512'],
    });
    await this.renew();
  }

  // A page in a context of its own: at the start, and where one does not answer any more.
  async renew() {
    const old = this.context;
    this.context = await this.browser.newContext({
      viewport: { width: 1280, height: HEIGHT }, reducedMotion: 'reduce', serviceWorkers: 'block', locale: 'en-US',
      timezoneId: 'UTC', acceptDownloads: false,
    });
    this.page = await this.context.newPage();
    this.page.setDefaultTimeout(this.request.patience * 1000);
    await this.page.clock.install({ time: NOON });
    await this.context.route('**/*', (route) => this.answer(route));
    this.cdp = await this.context.newCDPSession(this.page);
    this.page.on('console', (message) => {
      if (message.type() === 'error') this.errors.push(`console: ${message.text()}`);
    });
    this.page.on('pageerror', (error) => this.errors.push(`uncaught: ${error.message}`));
    this.page.on('dialog', (dialog) => dialog.accept().catch(() => {}));
    this.context.on('page', (other) => { if (other !== this.page) other.close().catch(() => {}); });
    if (old) old.close().catch(() => {});
  }

  async answer(route) {
    this.open += 1;
    try {
      const url = route.request().url();
      const own = new URL(url).hostname.endsWith('.page.test');
      const file = own ? fileOf(this.site, url, this.request) : null;
      if (file) {
        await route.fulfill({ body: file.body, contentType: TYPES[path.extname(file.name).toLowerCase()] ?? 'application/octet-stream' });
      } else if (own && new URL(url).pathname === '/favicon.ico') {
        await route.fulfill({ status: 204, body: '' });
      } else {
        this.errors.push(`request: ${own ? new URL(url).pathname : url} is not there`);
        await route.fulfill({ status: 404, body: 'not found', contentType: 'text/plain' });
      }
    } catch {
      // The page is gone.
    } finally {
      this.open -= 1;
    }
  }

  async visit(page, width) {
    this.number += 1;
    await this.page.setViewportSize({ width, height: HEIGHT });
    await this.page.mouse.move(0, 0);
    this.origin = `http://t${this.number}.page.test`;
    this.errors.length = 0;
    await this.page.goto(`${this.origin}/${page}`, { waitUntil: 'load' });
    await this.settle();
  }

  // Lets the page come to rest: all requests answered, all timers of the next second fired, all transitions and
  // animations at their end, with what follows from that. No real clock decides.
  async settle(milliseconds = 1000) {
    for (let round = 0; round < 2; round += 1) {
      await this.answered();
      await this.page.clock.runFor(milliseconds / 2);
    }
    await this.frame();
    for (let round = 0; round < MOVEMENTS && await this.page.locator('html').locator('qcn=still').count() > 0; round += 1) {
      await this.frame();
      await this.answered();
    }
  }

  async answered() {
    do await this.cdp.send('Runtime.evaluate', { expression: '0' }); while (this.open > 0);
  }

  // Lays the page out and paints it, which observers of sizes wait for.
  async frame() {
    await this.cdp.send('Page.captureScreenshot', { format: 'png', clip: { x: 0, y: 0, width: 1, height: 1, scale: 1 } });
  }

  async shot(clip) {
    const { data } = await this.cdp.send('Page.captureScreenshot', clip
      ? { format: 'png', clip: { ...clip, scale: 1 } } : { format: 'png' });
    return data;
  }

  async pixels(clip) {
    return PNG.sync.read(Buffer.from(await this.shot(clip), 'base64'));
  }
}

async function runTest(session, test) {
  await session.visit(test.page, test.width);
  for (const [index, step] of test.steps.entries()) {
    try {
      await runStep(session, step);
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      return { step: index, message: error.message };
    }
    if (isAction(step)) await session.settle(step.wait ?? 1000);
  }
  return session.errors.length ? { step: test.steps.length, message: session.errors[0] } : null;
}

// A page that does not answer is given up: its test has failed, and the next one begins in another.
async function bounded(session, work) {
  let timer;
  const late = new Promise((resolve) => { timer = setTimeout(resolve, session.request.patience * 1000, 'late'); });
  try {
    const done = await Promise.race([work(), late]);
    if (done !== 'late') return done;
    await session.renew();
    return { step: 0, message: 'the page does not answer' };
  } catch (error) {
    await session.renew();
    return { step: 0, message: `the page cannot be used: ${String(error.message).split('\n')[0]}` };
  } finally {
    clearTimeout(timer);
  }
}

const request = read(), served = new Set();
const session = new Session(request);
await session.start();
for (const test of request.tests) {
  const failure = await bounded(session, () => runTest(session, test));
  tell({ id: test.id, outcome: failure ? 'failed' : 'passed', ...failure });
  if (failure && request.failFast) break;
}
for (const look of request.looks) {
  let seen = '', tree = '';
  const failure = await bounded(session, async () => {
    const found = await runTest(session, look);
    [seen, tree] = [await session.shot(), await session.page.locator('body').ariaSnapshot()];
    return found;
  });
  tell({ look: look.id, png: seen, tree, message: failure?.message ?? '' });
}
for (const place of request.surveys) {
  let found = null;
  const failure = await bounded(session, async () => { found = await survey(session, place); return null; });
  tell({ survey: place, found, message: failure?.message ?? '' });
}
await session.browser.close();
tell({ end: true, served: [...served] });
