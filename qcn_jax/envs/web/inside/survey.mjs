// What a page offers when it is opened: the elements that a visitor can use, found in the DOM, where they lie and whether
// they can be seen, and whether the page fits its window.
import { painted } from './steps.mjs';

const ROLES = ['button', 'link', 'checkbox', 'radio', 'switch', 'tab', 'menuitem', 'combobox', 'textbox', 'searchbox',
  'slider', 'spinbutton'];

// Interactive elements that can be told by role and name, from the lines of the accessibility tree.
function offered(tree) {
  const found = [...tree.matchAll(/^\s*- (\w+) "((?:[^"\\]|\\.)*)"/gm)]
    .map(([, role, name]) => ({ role, name: JSON.parse(`"${name}"`) })).filter(({ role }) => ROLES.includes(role));
  const keys = found.map((one) => JSON.stringify(one));
  return found.filter((_, index) => keys.filter((key) => key === keys[index]).length === 1);
}

export async function survey(session, place) {
  await session.visit(place.page, place.width);
  const png = await session.shot(), tree = await session.page.locator('body').ariaSnapshot();
  const fits = await session.page.locator('html').locator('qcn=fits').count() > 0;
  const elements = [];
  for (const target of offered(tree).slice(0, place.most)) {
    const found = session.page.getByRole(target.role, { name: target.name, exact: true });
    if (await found.count() === 1) elements.push({ ...target, box: await found.boundingBox() });
  }
  for (const element of elements) {  // which scrolls; all boxes have been taken before
    const found = session.page.getByRole(element.role, { name: element.name, exact: true });
    element.hidden = await painted(session, found);
  }
  return { png, tree, fits, elements, errors: [...session.errors] };
}
