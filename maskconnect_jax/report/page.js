'use strict';
// Pointing, arrow keys and the slider. Everything else is there without it.

// A block that is pointed at or focused shows what it reads and who reads it.
for (const figure of document.querySelectorAll('.wiring')) {
  const output = figure.querySelector('output');
  for (const svg of figure.querySelectorAll('.topology')) {
    const nodes = [...svg.querySelectorAll('.node')];
    const edges = [...svg.querySelectorAll('.edge')];
    const show = (node) => {
      const name = node && node.dataset.node;
      svg.classList.toggle('picked', Boolean(node));
      for (const edge of edges) {
        edge.classList.toggle('in', edge.dataset.to === name);
        edge.classList.toggle('out', edge.dataset.from === name);
      }
      nodes.forEach((one) => one.classList.toggle('on', one === node));
      output.textContent = node ? node.getAttribute('aria-label') : '';
    };
    nodes.forEach((node, at) => {
      // One stop of the Tab key; the arrow keys go on from there.
      node.setAttribute('tabindex', at ? '-1' : '0');
      node.querySelector('title').remove(); // the line below says the same
      node.addEventListener('pointerenter', () => show(node));
      node.addEventListener('click', () => node.focus());
      node.addEventListener('focus', () => show(node));
      node.addEventListener('blur', () => show(null));
      node.addEventListener('pointerleave', () => {
        const focused = nodes.indexOf(document.activeElement);
        show(focused < 0 ? null : nodes[focused]);
      });
      node.addEventListener('keydown', (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1,
          Home: -nodes.length, End: nodes.length }[event.key];
        if (!step) return;
        event.preventDefault();
        const to = Math.min(Math.max(at + step, 0), nodes.length - 1);
        nodes.forEach((one) => one.setAttribute('tabindex', '-1'));
        nodes[to].setAttribute('tabindex', '0');
        nodes[to].focus();
      });
    });
  }
}

// The real mask: a slider over the recorded steps, and a cell to read.
const stored = document.getElementById('masks');
if (stored) {
  const record = JSON.parse(stored.textContent);
  const bytes = atob(record.levels);
  const figure = stored.closest('.masks');
  const cells = [...figure.querySelectorAll('.cell')];
  const output = figure.querySelector('.about-cell');
  const slider = document.getElementById('step');
  const chosen = new Set();
  for (const dot of figure.querySelectorAll('.chosen')) {
    const svg = dot.closest('svg');
    const x = Math.floor(dot.getAttribute('cx'));
    const y = Math.floor(dot.getAttribute('cy'));
    chosen.add(svg.querySelector(`.cell[x="${x}"][y="${y}"]`));
  }
  let at = record.steps.length - 1;
  let picked = null;

  const level = (cell) =>
    bytes.charCodeAt(at * record.cells + cells.indexOf(cell)) / 100;
  const read = () => {
    cells.forEach((cell) => cell.classList.toggle('on', cell === picked));
    if (!picked) {
      output.textContent = '';
      return;
    }
    const [target, source] = picked.dataset.at.split(' ');
    const kind = target.includes('.') ? 'Branch' : 'Block';
    const kept = chosen.has(picked) ? ', in the topology' : '';
    const step = record.steps[at].toLocaleString('en');
    output.textContent = `${kind} ${target}, source ${source}: r = ` +
      `${level(picked).toFixed(2)} after step ${step}${kept}.`;
  };

  if (slider) {
    slider.addEventListener('input', () => {
      at = Number(slider.value);
      cells.forEach((cell, n) => cell.style.setProperty(
        '--r', bytes.charCodeAt(at * record.cells + n) / 100));
      const step = record.steps[at].toLocaleString('en');
      document.getElementById('step-at').textContent = step;
      slider.setAttribute('aria-valuetext', `step ${step}`);
      if (picked) read();
    });
    slider.dispatchEvent(new Event('input')); // a reload may have kept a place
  }

  for (const svg of figure.querySelectorAll('.matrix')) {
    const own = new Map([...svg.querySelectorAll('.cell')].map(
      (cell) => [`${cell.getAttribute('x')} ${cell.getAttribute('y')}`, cell]));
    const pick = (cell) => { picked = cell; read(); };
    svg.addEventListener('pointermove', (event) => {
      if (event.target.classList.contains('cell')) pick(event.target);
    });
    svg.addEventListener('pointerleave', () => {
      if (document.activeElement !== svg) pick(null);
    });
    svg.addEventListener('focus', () => {
      if (![...own.values()].includes(picked)) pick(own.values().next().value);
    });
    svg.addEventListener('blur', () => pick(null));
    svg.addEventListener('keydown', (event) => {
      const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0],
        ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      if (!move || !picked) return;
      event.preventDefault();
      const x = Number(picked.getAttribute('x')) + move[0];
      const y = Number(picked.getAttribute('y')) + move[1];
      const next = own.get(`${x} ${y}`);
      if (next) pick(next);
    });
  }
}
