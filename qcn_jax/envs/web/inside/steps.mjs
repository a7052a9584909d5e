// What a test can do to a page and ask of it. A step is one object whose first key names it; see page_tests.py.

export class Failure extends Error {}

const LEAST_CHANGE = 24;  // of 255, in one channel: below, people do not notice a pixel
const LEAST_PIXELS = 4;
const SLACK = 1;  // pixels by which boxes may touch

// Runs in the content scripts' world. `qcn=hit` matches the element itself where a click at its middle reaches it, and
// so on; none of it is within the page's reach.
export function contentEngine() {
  const facts = {
    hit(element) {
      const box = element.getBoundingClientRect();
      const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      const label = element.labels && [...element.labels].some((one) => one.contains(top));
      return top !== null && (element.contains(top) || top.contains(element) || label);
    },
    focus: (element) => document.activeElement === element,
    fits: () => document.documentElement.scrollWidth <= document.documentElement.clientWidth,
    text: (element) => element.innerText?.trim() !== '' || (element.matches('input,textarea')
      && !element.matches('[type=checkbox],[type=radio],[type=range],[type=color]') && element.value !== ''),
    // Painting what an element writes, or the whole of it, can be turned off and on again.
    blank: (element) => { element.setAttribute('data-qcn', 'text'); return true; },
    empty: (element) => { element.setAttribute('data-qcn', 'all'); return true; },
    restore: (element) => { element.removeAttribute('data-qcn'); return true; },
    prepare() {
      if (document.getElementById('qcn-style')) return true;
      const style = document.createElement('style');
      style.id = 'qcn-style';
      style.textContent = '[data-qcn=text],[data-qcn=text] *{-webkit-text-fill-color:transparent!important;'
        + 'text-shadow:none!important;text-decoration-color:transparent!important;transition:none!important}'
        + '[data-qcn=text] *{opacity:0!important}[data-qcn=all]{opacity:0!important;transition:none!important}';
      document.documentElement.append(style);
      return true;
    },
    // Ends all movements that end; whether there were such.
    still() {
      const moving = document.getAnimations().filter((one) => one.playState === 'running' && one.playbackRate !== 0
        && Number.isFinite(one.effect?.getComputedTiming().endTime));
      moving.forEach((one) => one.finish());
      return moving.length > 0;
    },
    unprepare() { document.getElementById('qcn-style')?.remove(); return true; },
  };
  return {
    query(root, name) { return facts[name](root) ? root : null; },
    queryAll(root, name) { return facts[name](root) ? [root] : []; },
  };
}

const words = (target) => target.role ? `${target.role} “${target.name ?? ''}”`
  : target.label ? `field “${target.label}”` : target.text ? `text “${target.text}”` : `element ${target.css}`;

function locate(session, target) {
  const scope = target.in ? locate(session, target.in) : session.page;
  let found;
  if (target.role) found = scope.getByRole(target.role, target.name === undefined ? {} : { name: target.name, exact: true });
  else if (target.label) found = scope.getByLabel(target.label, { exact: true });
  else if (target.text) found = scope.getByText(target.text, { exact: true });
  else found = scope.locator(target.css);
  return target.nth === undefined ? found : found.nth(target.nth);
}

async function one(session, target) {
  const found = locate(session, target), count = await found.count();
  if (count !== 1) throw new Failure(count ? `there are ${count} of ${words(target)}, expected one` : `there is no ${words(target)}`);
  return found;
}

const fact = async (element, name) => await element.locator(`qcn=${name}`).count() > 0;

// Why an element changes no pixels of the page; '' where it does.
export async function painted(session, element) {
  if (!await element.isVisible()) return 'is hidden';
  await element.scrollIntoViewIfNeeded();
  const box = await element.boundingBox();
  if (!box || box.width < 1 || box.height < 1) return 'has no size';
  const { width, height } = session.page.viewportSize();
  const x = Math.max(0, Math.floor(box.x)), y = Math.max(0, Math.floor(box.y));
  const clip = { x, y, width: Math.min(width, Math.ceil(box.x + box.width)) - x, height: Math.min(height, Math.ceil(box.y + box.height)) - y };
  if (clip.width < 1 || clip.height < 1) return 'is outside of the screen';
  const root = session.page.locator('html');
  await fact(root, 'prepare');
  try {
    const before = await session.pixels(clip);
    await fact(element, await fact(element, 'text') ? 'blank' : 'empty');
    const after = await session.pixels(clip);
    await fact(element, 'restore');
    let changed = 0;
    for (let at = 0; at < before.data.length && changed < LEAST_PIXELS; at += 4) {
      if ([0, 1, 2].some((channel) => Math.abs(before.data[at + channel] - after.data[at + channel]) >= LEAST_CHANGE)) changed += 1;
    }
    return changed < LEAST_PIXELS ? 'cannot be seen: it is covered, transparent or of its background’s colour' : '';
  } finally {
    await fact(root, 'unprepare');
  }
}

async function reach(session, target) {
  const element = await one(session, target);
  if (!await element.isVisible()) throw new Failure(`${words(target)} is hidden`);
  await element.scrollIntoViewIfNeeded();
  if (!await fact(element, 'hit')) throw new Failure(`${words(target)} cannot be clicked: something covers it`);
  if (await element.isDisabled()) throw new Failure(`${words(target)} is disabled`);
  const box = await element.boundingBox();
  return { element, x: box.x + box.width / 2, y: box.y + box.height / 2 };
}

async function boxes(session, targets) {
  const found = [];
  for (const target of targets) {
    const box = await (await one(session, target)).boundingBox();
    if (!box) throw new Failure(`${words(target)} is hidden`);
    found.push(box);
  }
  return found;
}

const flat = (text) => text.replace(/\s+/g, ' ').trim();
const meet = (a, b) => Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x) > SLACK
  && Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y) > SLACK;

function expect(good, message) {
  if (!good) throw new Failure(message);
}

const STEPS = {
  // Actions.
  async click(session, step) {
    const { x, y } = await reach(session, step.click);
    await session.page.mouse.click(x, y);
  },
  async hover(session, step) {
    const { x, y } = await reach(session, step.hover);
    await session.page.mouse.move(x, y);
  },
  async type(session, step) {
    const { element, x, y } = await reach(session, step.into);
    if (!await fact(element, 'focus')) await session.page.mouse.click(x, y);
    expect(await fact(element, 'focus'), `${words(step.into)} does not take the focus when it is clicked`);
    await session.page.keyboard.type(step.type);
  },
  async press(session, step) { await session.page.keyboard.press(step.press); },
  async select(session, step) {
    const { element } = await reach(session, step.from);
    const options = await element.locator('option').allInnerTexts();
    expect(options.map(flat).includes(step.select), `${words(step.from)} has no option “${step.select}”`);
    await element.selectOption({ label: step.select });
  },
  async open(session, step) { await session.page.goto(`${session.origin}/${step.open}`); },
  async resize(session, step) { await session.page.setViewportSize({ width: step.resize, height: 800 }); },
  async pass() {},

  // Checks.
  async see(session, step) {
    const hidden = await painted(session, await one(session, step.see));
    expect(!hidden, `${words(step.see)} ${hidden}`);
  },
  async gone(session, step) {
    for (const element of await locate(session, step.gone).all()) {
      expect(await painted(session, element) !== '', `${words(step.gone)} is still to be seen`);
    }
  },
  async text(session, step) {
    const found = flat(await (await one(session, step.text)).innerText());
    expect(found === flat(step.is), `${words(step.text)} reads “${found}”, expected “${flat(step.is)}”`);
  },
  async value(session, step) {
    const found = await (await one(session, step.value)).inputValue();
    expect(found === step.is, `${words(step.value)} holds “${found}”, expected “${step.is}”`);
  },
  async count(session, step) {
    const visible = await Promise.all((await locate(session, step.count).all()).map((element) => element.isVisible()));
    const found = visible.filter(Boolean).length;
    expect(found === step.is, `${found} of ${words(step.count)} can be seen, expected ${step.is}`);
  },
  async focus(session, step) {
    expect(await fact(await one(session, step.focus), 'focus'), `${words(step.focus)} does not have the focus`);
  },
  async tab(session, step) {
    for (const target of step.tab) {
      await session.page.keyboard.press('Tab');
      expect(await fact(await one(session, target), 'focus'), `the Tab key does not reach ${words(target)} in its turn`);
    }
  },
  async tree(session, step) {
    const whole = step.tree === true ? session.page.locator('body') : await one(session, step.tree);
    const found = (await whole.ariaSnapshot()).split('\n'), wanted = step.is.split('\n');
    const at = wanted.findIndex((line, index) => line !== found[index]);
    const line = at < 0 && found.length > wanted.length ? wanted.length : at;
    expect(line < 0, `assistive technology is told “${flat(found[line] ?? 'nothing')}”, expected “${flat(wanted[line] ?? 'nothing')}”`);
  },
  async named(session, step) {  // in the browser's own accessibility tree
    const { nodes } = await session.cdp.send('Accessibility.getFullAXTree');
    const known = nodes.some((node) => !node.ignored && node.role?.value === step.named.role
      && flat(String(node.name?.value ?? '')) === step.named.name);
    expect(known, `the accessibility tree has no ${words(step.named)}`);
  },
  async fits(session) {
    expect(await fact(session.page.locator('html'), 'fits'), `the page is wider than the window of ${session.page.viewportSize().width} pixels`);
  },
  async apart(session, step) {
    const found = await boxes(session, step.apart);
    found.forEach((box, at) => found.slice(at + 1).forEach((other, next) => {
      expect(!meet(box, other), `${words(step.apart[at])} and ${words(step.apart[at + 1 + next])} overlap`);
    }));
  },
  async above(session, step) {
    const [a, b] = await boxes(session, step.above);
    expect(a.y + a.height <= b.y + SLACK, `${words(step.above[0])} is not above ${words(step.above[1])}`);
  },
  async beside(session, step) {
    const [a, b] = await boxes(session, step.beside);
    const level = Math.min(a.y + a.height, b.y + b.height) > Math.max(a.y, b.y) + SLACK;
    expect(level && a.x + a.width <= b.x + SLACK, `${words(step.beside[0])} is not to the left of ${words(step.beside[1])}`);
  },
  async inside(session, step) {
    const [a, b] = await boxes(session, step.inside);
    const within = a.x >= b.x - SLACK && a.y >= b.y - SLACK && a.x + a.width <= b.x + b.width + SLACK && a.y + a.height <= b.y + b.height + SLACK;
    expect(within, `${words(step.inside[0])} is not within ${words(step.inside[1])}`);
  },
  async size(session, step) {
    const [box] = await boxes(session, [step.size]);
    expect(box.width >= step.least[0] && box.height >= step.least[1], `${words(step.size)} has ${Math.round(box.width)} by `
      + `${Math.round(box.height)} pixels, expected at least ${step.least.join(' by ')}`);
  },
  async at(session, step) {
    const found = new URL(session.page.url());
    expect(found.pathname.slice(1) + found.hash === step.at, `the address is “${found.pathname.slice(1) + found.hash}”, expected “${step.at}”`);
  },
};

const ACTIONS = ['click', 'hover', 'type', 'press', 'select', 'open', 'resize'];

export const isAction = (step) => ACTIONS.includes(Object.keys(step)[0]) || 'wait' in step;

export async function runStep(session, step) {
  await STEPS[Object.keys(step)[0]](session, step);
}
