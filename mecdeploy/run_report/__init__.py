"""One self-contained HTML page about a finished run, and the same facts as JSON.

writing.py        report: gathers, renders, writes
facts.py          what a report says, as frozen data
gathering.py      each fact from the room that measures it
  layers.py         the layers of the file, from its graph
  counting.py       how onnxruntime uses their codes
  answering.py      what the networks answer, image by image
page.py           facts -> HTML, through page.html.jinja and page.css
  plots.py          training curves and histograms, by matplotlib
  graph_drawing.py  the layers as boxes and lines
"""
