// Text of a model as elements: paragraphs, headings, lists, quotes, tables, rules, code, bold, italic. What the model wrote only ever
// becomes text nodes; no markup of its own, no links and no pictures are made of it. Knows nothing of the page.

const FENCE = /^ {0,3}(```+|~~~+)\s{0,8}([\w+#.-]{0,32})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const RULE = /^ {0,3}([-*_])(?: {0,3}\1){2,80} {0,8}$/;
const UNDER = /^ {0,3}\|?(?: {0,40}:?-{1,200}:? {0,40}\|){0,64} {0,40}:?-{1,200}:? {0,40}\|? {0,8}$/; // a table's second line
const COLUMNS = 64;
// Bounded stretches: a hostile text must not make this slow.
const INLINE =
  /(`{1,8})(?!`)([^]{0,2000}?[^`])\1(?!`)|\*\*(?=\S)([^]{0,2000}?\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]{0,500}?[^\s*])\*(?![\w*])/g;
const DEEPEST = 6; // quotes in quotes

// Show `text` inside `target`. Blocks that did not change keep their elements, so that a growing answer costs its last
// block and a selection above survives.
export function render(target, text, depth = 0) {
  const blocks = split(text);
  const same = [...target.children].findIndex((child, at) => child.source !== blocks[at]);
  const kept = same < 0 ? Math.min(target.children.length, blocks.length) : same;
  while (target.children.length > kept) target.lastElementChild.remove();
  for (const source of blocks.slice(kept)) {
    const made = block(source.split("\n"), depth);
    made.source = source;
    target.append(made);
  }
}

// The text cut where a block ends: at blank lines, and around fenced code.
function split(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  const close = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.replace(/\r\n?/g, "\n").split("\n")) {
    const mark = FENCE.exec(line)?.[1];
    if (fence !== null) {
      lines.push(line);
      if (mark && mark[0] === fence[0] && mark.length >= fence.length && line.trim() === mark) {
        fence = null;
        close();
      }
    } else if (mark) {
      close();
      fence = mark;
      lines.push(line);
    } else if (line.trim() === "") {
      close();
    } else {
      const alone = HEADING.test(line) || RULE.test(line);
      if (alone || startsOther(lines, line)) close();
      lines.push(line);
      if (alone) close();
    }
  }
  close();
  return blocks;
}

// A list or a quote right under a paragraph is a block of its own.
function startsOther(lines, line) {
  if (!lines.length) return false;
  const kind = (l) => (ITEM.test(l) ? "item" : QUOTE.test(l) ? "quote" : "text");
  const [was, is] = [kind(lines[0]), kind(line)];
  return was !== is && !(was === "item" && is === "text");
}

function block(lines, depth) {
  const fence = FENCE.exec(lines[0]);
  if (fence) return code(lines, fence);
  const heading = HEADING.exec(lines[0]);
  if (heading) return inline(element(`h${Math.min(6, heading[1].length + 2)}`), heading[2]);
  if (RULE.test(lines[0])) return element("hr");
  if (ITEM.test(lines[0])) return list(lines);
  const head = lines.length > 1 && lines[0].includes("|") && lines[1].includes("|") && UNDER.test(lines[1]);
  if (head && cells(lines[0]).length === cells(lines[1]).length) return table(lines);
  if (QUOTE.test(lines[0]) && depth < DEEPEST) {
    const quote = element("blockquote");
    render(quote, lines.map((line) => QUOTE.exec(line)?.[1] ?? line).join("\n"), depth + 1);
    return quote;
  }
  return inline(element("p"), lines.join("\n"));
}

function code(lines, [, mark, language]) {
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(mark);
  const body = lines.slice(1, closed ? -1 : undefined).join("\n");
  const box = element("div", "code");
  const bar = box.appendChild(element("div", "code-bar"));
  bar.appendChild(element("span")).textContent = language || "code";
  const copy = bar.appendChild(element("button", "text copy-code"));
  copy.type = "button";
  copy.textContent = "Copy";
  const pre = box.appendChild(element("pre"));
  pre.tabIndex = 0; // it scrolls
  pre.appendChild(element("code")).textContent = body;
  return box;
}

// Rows as wide as the first one; it scrolls where it is wider than the page.
function table(lines) {
  const box = element("div", "table");
  box.tabIndex = 0;
  const made = box.appendChild(element("table"));
  const sides = cells(lines[1]).map((mark) => (!mark.endsWith(":") ? "" : mark.startsWith(":") ? "center" : "right"));
  made.appendChild(element("thead")).append(row("th", lines[0], sides));
  made.appendChild(element("tbody")).append(...lines.slice(2).map((line) => row("td", line, sides)));
  return box;
}

function row(name, line, sides) {
  const texts = cells(line);
  const made = element("tr");
  made.append(...sides.map((side, n) => inline(element(name, side), texts[n] ?? "")));
  return made;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/, COLUMNS).map((text) => text.trim().replaceAll("\\|", "|"));
}

// Items by their indent; a line without a mark goes on with the item before it.
function list(lines) {
  const top = listOf(ITEM.exec(lines[0])[2]);
  const open = [{ indent: ITEM.exec(lines[0])[1].length, list: top, item: null }];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (!found) {
      inline(open.at(-1).item, ` ${line.trim()}`);
      continue;
    }
    const [, space, mark, text] = found;
    while (open.length > 1 && space.length < open.at(-1).indent) open.pop();
    if (open.at(-1).item && space.length >= open.at(-1).indent + 2 && open.length < 8) {
      const inner = open.at(-1).item.appendChild(listOf(mark));
      open.push({ indent: space.length, list: inner, item: null });
    }
    open.at(-1).item = open.at(-1).list.appendChild(inline(element("li"), text));
  }
  return top;
}

function listOf(mark) {
  const numbered = /\d/.test(mark);
  const made = element(numbered ? "ol" : "ul");
  if (numbered) made.start = parseInt(mark, 10);
  return made;
}

function inline(target, text) {
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    target.append(text.slice(from, match.index));
    const [, , codeText, bold, italic] = match;
    const name = codeText !== undefined ? "code" : bold !== undefined ? "strong" : "em";
    const made = target.appendChild(element(name));
    if (name === "code") made.textContent = codeText;
    else inline(made, bold ?? italic);
    from = match.index + match[0].length;
  }
  target.append(text.slice(from));
  return target;
}

function element(name, classes = "") {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  return made;
}
