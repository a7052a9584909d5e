// Finds what a page offers and tries it: for each interactive element what assistive technology is told after it was
// used, and which elements lie where. Only what is the same in two visits is told.
import { Failure, runStep } from './steps.mjs';

const ROLES = ['button', 'link', 'checkbox', 'radio', 'switch', 'tab', 'menuitem', 'combobox', 'textbox', 'searchbox', 'slider'];
const TYPED = ['textbox', 'searchbox'];
const SAMPLE = 'plum 7';

async function tree(session) {
  return session.page.locator('body').ariaSnapshot();
}

// Interactive elements that can be told by role and name, from the tree's lines.
function offered(text) {
  const found = [...text.matchAll(/^\s*- (\w+) "((?:[^"\\]|\\.)*)"/gm)]
    .map(([, role, name]) => ({ role, name: JSON.parse(`"${name}"`) })).filter(({ role }) => ROLES.includes(role));
  const keys = found.map((one) => JSON.stringify(one));
  return found.filter((_, index) => keys.filter((key) => key === keys[index]).length === 1);
}

async function attempt(session, place, steps) {
  await session.visit(place.page, place.width);
  for (const step of steps) {
    try {
      await runStep(session, step);
    } catch (error) {
      if (error instanceof Failure) return null;
      throw error;
    }
    await session.settle();
  }
  return session.errors.length ? null : tree(session);
}

async function twice(session, place, steps) {
  const first = await attempt(session, place, steps);
  return first !== null && first === await attempt(session, place, steps) ? first : null;
}

async function visible(session, targets) {
  const kept = [];
  for (const target of targets) {
    try {
      await runStep(session, { see: target });
      kept.push(target);
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
    }
  }
  return kept;
}

export async function explore(session, place) {
  const start = await twice(session, place, []);
  if (start === null) return { start: null, elements: [], results: [], fits: false };
  const elements = offered(start).slice(0, place.most);
  const seen = await visible(session, elements);
  const boxes = [];
  for (const target of seen) {
    boxes.push(await session.page.getByRole(target.role, { name: target.name, exact: true }).boundingBox());
  }
  let fits = true;
  await runStep(session, { fits: true }).catch((error) => { if (!(error instanceof Failure)) throw error; fits = false; });
  const results = [];
  for (const target of seen) {
    const steps = TYPED.includes(target.role) ? [{ type: SAMPLE, into: target }, { press: 'Enter' }] : [{ click: target }];
    const after = await twice(session, place, steps);
    if (after !== null) results.push({ steps, tree: after });
  }
  return { start, elements: seen, boxes, fits, results };
}
