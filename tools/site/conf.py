"""How Sphinx makes the site; `tools/docs.py` calls it."""
import shutil
from configparser import ConfigParser
from importlib.resources import files
from pathlib import Path

import plotly

here = Path(__file__).parent
settings = ConfigParser(interpolation=None)
settings.read(here.parents[1]/"settings.ini")
project, version = settings["DEFAULT"]["title"], settings["DEFAULT"]["version"]

extensions = ["myst_nb"]
root_doc = "index"
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"
nb_mime_priority_overrides = [("html", "text/html", 0)]
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline"]
myst_heading_anchors = 4
mathjax_path = "tex-svg.js"

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sourcelink = html_show_copyright = html_show_sphinx = False
html_static_path = [str(here/"static")]
html_css_files = ["site.css"]
html_js_files = [("nav.js", {"defer": "defer"})]
html_theme_options = {"navigation_with_keys": True}


def scripts(app, page, template, context, doctree):
    "Plotly only where a figure is."
    if doctree and 'class="figure"' in context.get("body", ""):
        app.add_js_file("plotly.min.js", loading_method="defer"); app.add_js_file("site.js", loading_method="defer")


def libraries(app):
    "The scripts come from installed packages, not from another host."
    static = Path(app.outdir)/"_static"; static.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(plotly.__file__).parent/"package_data/plotly.min.js", static)
    shutil.copy(str(files("sphinx-mathjax-offline")/"static/mathjax/tex-svg.js"), static)


def setup(app):
    app.connect("html-page-context", scripts)
    app.connect("builder-inited", libraries)
