/* What keys and screen readers need, and neither Sphinx nor the theme writes. */
document.addEventListener("DOMContentLoaded", () => {
  const names = { ".sidebar-drawer": "All pages", ".toc-drawer": "On this page" };
  for (const [drawer, name] of Object.entries(names)) {
    document.querySelector(drawer)?.setAttribute("aria-label", name);
  }
  for (const caption of document.querySelectorAll("[role=heading]:not([aria-level])")) {
    caption.setAttribute("aria-level", "2");
  }
  // Keys reach, and then scroll, code and tables that are wider than the page.
  const wide = new ResizeObserver((changes) => {
    for (const { target } of changes) {
      if (target.scrollWidth > target.clientWidth) target.setAttribute("tabindex", "0");
      else target.removeAttribute("tabindex");
    }
  });
  for (const part of document.querySelectorAll("pre, .table-wrapper")) wide.observe(part);
});
