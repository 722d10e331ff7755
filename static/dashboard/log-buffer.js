/**
 * Terminal output as lines that can be shown: bounded, with the basic colours, without anything else a terminal obeys.
 *
 * A carriage return writes its line anew, so progress bars stay one line. Pure; nothing here touches the document.
 */

export const BLOCK_LINES = 100;
const BLOCKS_MOST = 50;
const LINE_MOST = 4000; // characters shown of one line

// CSI sequences, OSC sequences with their end, other two-character escapes.
const ESCAPE = /\x1b(?:\[([0-?]*)[ -/]*([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)|[PX^_][^\x1b]*\x1b\\|[ -/]*[0-Z\\^-~])/g;
// Other control characters, and those that turn the direction of text: they could make a line look like another.
const CONTROLS = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

const clean = (text) => text.replace(CONTROLS, "");

function applyStyle(style, parameters) {
  const codes = parameters === "" ? [0] : parameters.split(/[;:]/).map(Number);
  let next = style;
  for (let at = 0; at < codes.length; at += 1) {
    const code = codes[at];
    if (code === 0) next = {};
    else if (code === 1) next = { ...next, bold: true };
    else if (code === 2) next = { ...next, dim: true };
    else if (code === 4) next = { ...next, underline: true };
    else if (code === 22) next = { ...next, bold: false, dim: false };
    else if (code === 24) next = { ...next, underline: false };
    else if ((code >= 30 && code <= 37) || (code >= 90 && code <= 97)) next = { ...next, colour: code % 10 };
    else if (code === 39) next = { ...next, colour: undefined };
    else if (code === 38 || code === 48) at += codes[at + 1] === 5 ? 2 : codes[at + 1] === 2 ? 4 : 1;
  }
  return next;
}

function classOf({ bold, dim, underline, colour }) {
  const names = [bold && "ansi-bold", dim && "ansi-dim", underline && "ansi-underline"];
  if (colour !== undefined) names.push(`ansi-${colour}`);
  return names.filter(Boolean).join(" ");
}

/** One line as [{text, style}], and the style that the next line begins with. */
export function styled(line, style = {}) {
  if (!line.includes("\x1b")) return { parts: [{ text: clean(line), style: classOf(style) }], style };
  const parts = [];
  let current = style;
  let from = 0;
  const add = (text) => text && parts.push({ text: clean(text), style: classOf(current) });
  for (const match of line.matchAll(ESCAPE)) {
    add(line.slice(from, match.index));
    from = match.index + match[0].length;
    if (match[2] === "m") current = applyStyle(current, match[1]);
  }
  add(line.slice(from));
  return { parts, style: current };
}

/** Takes output piece by piece, keeps the last lines in blocks: {id, lines, version}. */
export class LogBuffer {
  constructor() {
    this.clear();
  }

  clear() {
    this.blocks = [];
    this.dropped = 0; // lines that were there and are no longer kept
    this.count = 0; // lines so far, with the unfinished one
    this._line = "";
    this._open = false; // the last line shown is unfinished
    this._returned = false;
    this._style = {};
    this._source = "";
  }

  get empty() {
    return this.count === 0;
  }

  /** The next output; `source` is a style's name for where it comes from. Two sources never share a line. */
  push(text, source = "") {
    if (source !== this._source && this._open) this._finish();
    this._source = source;
    const pieces = text.split("\n");
    pieces.forEach((piece, index) => {
      this._extend(piece);
      if (index < pieces.length - 1) this._finish();
    });
    if (this._line !== "" || this._open) this._show();
  }

  /** A line of the page's own. */
  note(text) {
    if (this._open) this._finish();
    this._put({ parts: [{ text, style: "log-note" }] }, false);
  }

  _extend(piece) {
    for (const [index, part] of piece.split("\r").entries()) {
      if (index > 0) this._returned = true;
      if (part === "") continue;
      if (this._returned) this._line = "";
      this._returned = false;
      // Of an endless line only the beginning is kept, and how much more there was.
      this._line = (this._line + part).slice(0, LINE_MOST * 4);
    }
  }

  _finish() {
    const style = this._show();
    this._style = style;
    this._line = "";
    this._open = false;
    this._returned = false;
  }

  _show() {
    const { parts, style } = styled(this._line, this._style);
    let room = LINE_MOST;
    const shown = [];
    for (const part of parts) {
      if (room <= 0) break;
      shown.push({ text: part.text.slice(0, room), style: `${this._source} ${part.style}`.trim() });
      room -= part.text.length;
    }
    if (room < 0) shown.push({ text: " … (long line cut)", style: "log-note" });
    this._put({ parts: shown }, this._open);
    this._open = true;
    return style;
  }

  _put(line, replace) {
    let block = this.blocks.at(-1);
    if (replace && block) {
      block.lines[block.lines.length - 1] = line;
      block.version += 1;
      return;
    }
    if (!block || block.lines.length >= BLOCK_LINES) {
      block = { id: (block?.id ?? 0) + 1, lines: [], version: 0 };
      this.blocks.push(block);
      if (this.blocks.length > BLOCKS_MOST) this.dropped += this.blocks.shift().lines.length;
    }
    block.lines.push(line);
    block.version += 1;
    this.count += 1;
  }
}
