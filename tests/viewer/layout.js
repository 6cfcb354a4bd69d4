// Which texts of the page lie over each other, or leave or are cut by their panel; read by test_layout.py.
(() => {
  const NEAR = 1.5; // px that boxes of lines may touch
  const wrong = [];
  const say = (s) => JSON.stringify(s.trim().slice(0, 30));

  // ---- what is HTML: each line of text, cut to what is in sight ----
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility() || parent.closest(".sr, script, style, option, svg:not(.lines)")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const panel = parent.closest("header, section, #notice, #tip");
    for (const r of range.getClientRects()) {
      let box = { x0: r.left, y0: r.top, x1: r.right, y1: r.bottom };
      for (let e = parent; e && e !== document.body; e = e.parentElement) {
        const css = getComputedStyle(e);
        if (css.overflowX === "visible" && css.overflowY === "visible") continue;
        const c = e.getBoundingClientRect();
        // Cut on purpose: with an ellipsis, or to be scrolled to.
        const meant = css.textOverflow === "ellipsis" || css.webkitLineClamp !== "none" || ["auto", "scroll"].includes(css.overflowX) || e.id === "subgraph";
        if (!meant && (box.x1 > c.right + NEAR || box.x0 < c.left - NEAR || box.y1 > c.bottom + NEAR || box.y0 < c.top - NEAR)) wrong.push(`cut: ${say(node.data)}`);
        box = { x0: Math.max(box.x0, c.left), y0: Math.max(box.y0, c.top), x1: Math.min(box.x1, c.right), y1: Math.min(box.y1, c.bottom) };
      }
      if (box.x1 - box.x0 < 1 || box.y1 - box.y0 < 1) continue;
      const p = panel?.getBoundingClientRect();
      if (p && (box.x0 < p.left - NEAR || box.x1 > p.right + NEAR || box.y0 < p.top - NEAR || box.y1 > p.bottom + NEAR)) wrong.push(`outside its panel: ${say(node.data)}`);
      if (box.x1 > innerWidth + NEAR || box.y1 > innerHeight + NEAR) wrong.push(`outside the window: ${say(node.data)}`);
      // What scrolls away under a heading that stays is no overlap.
      texts.push({ ...box, text: node.data, node, sticky: parent.closest("th, #patched h3") !== null, card: parent.closest(".card") });
    }
  }
  const over = (a, b) => Math.min(a.x1, b.x1) - Math.max(a.x0, b.x0) > NEAR && Math.min(a.y1, b.y1) - Math.max(a.y0, b.y0) > NEAR + 2;
  texts.forEach((a, i) => texts.slice(0, i).forEach((b) => {
    if (a.node !== b.node && !a.sticky && !b.sticky && over(a, b)) wrong.push(`over each other: ${say(a.text)} and ${say(b.text)}`);
  }));

  // ---- controls ----
  const controls = [...document.querySelectorAll("button, input, select, [role=separator]")].filter((e) => e.checkVisibility() && !e.closest("#sidebody, #patched, #table, .rows, #cards"))
    .map((e) => { const r = e.getBoundingClientRect(); return { x0: r.left, y0: r.top, x1: r.right, y1: r.bottom, text: e.id || e.textContent || "" }; }).filter((r) => r.x1 > r.x0);
  controls.forEach((a, i) => controls.slice(0, i).forEach((b) => { if (over(a, b)) wrong.push(`controls over each other: ${say(a.text)} and ${say(b.text)}`); }));

  // ---- the picture: the same drawing as SVG, its texts as turned boxes ----
  if (document.getElementById("graph").checkVisibility()) {
    const holder = document.createElement("div");
    holder.style.cssText = `position:fixed;left:0;top:0;visibility:hidden;font-family:${getComputedStyle(document.body).fontFamily}`;
    holder.append(new DOMParser().parseFromString(__jaxclt.svg(), "image/svg+xml").documentElement);
    document.body.append(holder);
    const picture = holder.firstChild, W = Number(picture.getAttribute("width")), H = Number(picture.getAttribute("height"));
    const boxes = [...picture.querySelectorAll("text")].filter((t) => t.textContent.trim()).map((t) => {
      const b = t.getBBox(), m = t.getCTM(), shrink = 2;
      const at = (x, y) => [m.a * x + m.c * y + m.e, m.b * x + m.d * y + m.f];
      return { text: t.textContent, corners: [
        at(b.x + 1, b.y + shrink), at(b.x + b.width - 1, b.y + shrink), at(b.x + b.width - 1, b.y + b.height - shrink), at(b.x + 1, b.y + b.height - shrink)] };
    });
    const split = (a, b) => [a, b].some(({ corners }) => [0, 1].some((i) => {
      const axis = [corners[i + 1][0] - corners[i][0], corners[i + 1][1] - corners[i][1]];
      const ends = (box) => { const d = box.corners.map((c) => c[0] * axis[0] + c[1] * axis[1]); return [Math.min(...d), Math.max(...d)]; };
      const [p, q] = [ends(a), ends(b)];
      return p[1] <= q[0] || q[1] <= p[0];
    }));
    // A graph wider than its window is scrolled; its texts may then be outside sideways.
    const frame = document.getElementById("graph").getBoundingClientRect();
    const whole = __jaxclt.nodes.map((n) => __jaxclt.where(n.id)).every((p) => p.x >= frame.left && p.x <= frame.right);
    boxes.forEach((a, i) => {
      if (a.corners.some(([x, y]) => y < -2 || y > H + 2 || (whole && (x < -2 || x > W + 2)))) wrong.push(`out of the picture: ${say(a.text)} at ${a.corners[0].map(Math.round)} to ${a.corners[2].map(Math.round)}`);
      boxes.slice(0, i).forEach((b) => { if (!split(a, b)) wrong.push(`over each other in the picture: ${say(a.text)} and ${say(b.text)}`); });
    });
    holder.remove();
  }
  if (document.documentElement.scrollWidth > innerWidth || document.documentElement.scrollHeight > innerHeight) wrong.push("the page scrolls");
  return wrong;
})()
