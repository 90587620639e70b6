/* Draws the Plotly figures of a page in the colours of its theme, and again when that changes; smaller where the column is narrow. */
(() => {
  const WIDE = 1120, LEAST = .7; // what a figure is laid out for, and how far it may shrink before it is scrolled
  const boxes = [...document.querySelectorAll(".figure")].map(box => {
    const text = box.firstElementChild.textContent, sheet = box.appendChild(document.createElement("div"));
    return { box, sheet, text, height: box.clientHeight };
  });
  const fit = () => boxes.forEach(({ box, sheet, height }) => {
    const scale = Math.min(1, Math.max(LEAST, box.parentElement.clientWidth / WIDE));
    Object.assign(sheet.style, { width: `${WIDE}px`, height: `${height}px`, transform: `scale(${scale})`, transformOrigin: "0 0" });
    Object.assign(box.style, { width: `${scale * WIDE}px`, height: `${scale * height}px` });
  });
  const dressed = layout => {
    const css = getComputedStyle(document.body), ink = css.getPropertyValue("--color-foreground-primary").trim(),
          line = css.getPropertyValue("--color-background-border").trim(), clear = "rgba(0,0,0,0)";
    const out = { ...layout, width: undefined, autosize: true, paper_bgcolor: clear, plot_bgcolor: clear, font: { ...layout.font, color: ink } };
    for (const k of ["xaxis", "yaxis", ...Object.keys(layout)].filter(k => /^[xy]axis\d*$/.test(k)))
      out[k] = { ...layout[k], gridcolor: line, zerolinecolor: line, color: ink, ...(layout[k]?.showline && { linecolor: line }) };
    out.annotations = (layout.annotations || []).map(a => ({ ...a, font: { ...a.font, color: ink } }));
    return out;
  };
  const dark = () => document.body.dataset.theme === "dark"
    || document.body.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches;
  const draw = () => boxes.forEach(({ sheet, text }) => { // what is black on light paper is light on dark
    const fig = JSON.parse(dark() ? text.replace(/"(#000000|#222222|black)"/gi, '"#e6e6e6"') : text);
    Plotly.react(sheet, fig.data, dressed(fig.layout), { displaylogo: false });
  });
  fit(); draw();
  addEventListener("resize", fit);
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
