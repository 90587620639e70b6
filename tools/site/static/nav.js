/* The sidebar begins at the page that is open. */
(() => {
  const bar = document.querySelector(".sidebar-scroll"), here = bar?.querySelector(".current-page");
  if (here) bar.scrollTop += here.getBoundingClientRect().top - bar.getBoundingClientRect().top - bar.clientHeight / 3;
})();
