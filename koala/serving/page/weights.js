// Weights of words in the prompt: Ctrl and an arrow change that of the selected text.

const STEP = 0.1;

/** Makes Ctrl+Up and Ctrl+Down in a text field change the weight of what is selected. */
export function weighs(field) {
  field.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
    event.preventDefault();
    weigh(field, event.key === "ArrowUp" ? STEP : -STEP);
  });
}

function weigh(field, by) {
  let [from, to] = [field.selectionStart, field.selectionEnd];
  const text = field.value;
  if (from === to) { // the word at the cursor
    while (from > 0 && /[^\s,()]/.test(text[from - 1])) from--;
    while (to < text.length && /[^\s,():]/.test(text[to])) to++;
  }
  if (from === to) return;
  let [inner, weight, start, end] = [text.slice(from, to), 1, from, to];
  const whole = /^\((.*):([\d.]+)\)$/s.exec(inner);
  const after = /^:([\d.]+)\)/.exec(text.slice(to));
  if (whole) [inner, weight] = [whole[1], Number(whole[2])];
  else if (text[from - 1] === "(" && after) {
    [start, end, weight] = [from - 1, to + after[0].length, Number(after[1])];
  }
  weight = Math.min(10, Math.max(0, Math.round((weight + by) * 10) / 10));
  const next = weight === 1 ? inner : `(${inner}:${weight})`;
  field.setRangeText(next, start, end, "preserve");
  const at = start + (weight === 1 ? 0 : 1);
  field.setSelectionRange(at, at + inner.length);
  field.dispatchEvent(new Event("input", { bubbles: true }));
}
