/* Draws the Plotly figures of a page in the colours of its theme, and again when the theme changes. */
(() => {
  const boxes = [...document.querySelectorAll(".figure")].map(box => ({ box, text: box.firstElementChild.textContent }));
  const dressed = layout => {
    const css = getComputedStyle(document.body), ink = css.getPropertyValue("--color-foreground-primary").trim(),
          line = css.getPropertyValue("--color-background-border").trim(), clear = "rgba(0,0,0,0)";
    const out = { ...layout, width: undefined, autosize: true, paper_bgcolor: clear, plot_bgcolor: clear, font: { ...layout.font, color: ink } };
    for (const k of ["xaxis", "yaxis", ...Object.keys(layout)].filter(k => /^[xy]axis\d*$/.test(k)))
      out[k] = { ...layout[k], gridcolor: line, zerolinecolor: line, linecolor: line, color: ink };
    out.annotations = (layout.annotations || []).map(a => ({ ...a, font: { ...a.font, color: ink } }));
    return out;
  };
  const dark = () => document.body.dataset.theme === "dark"
    || document.body.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches;
  const draw = () => boxes.forEach(({ box, text }) => { // what is black on light paper is light on dark
    const fig = JSON.parse(dark() ? text.replace(/"(#000000|#222222|black)"/gi, '"#e6e6e6"') : text);
    Plotly.react(box, fig.data, dressed(fig.layout), { responsive: true, displaylogo: false });
  });
  draw();
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
