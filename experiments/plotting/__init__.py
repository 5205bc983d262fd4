"""From result files to figures and the report. Needs pandas, matplotlib and Jinja2; never torch, never transformers.

files.py      one result file, of today or older -> rows
table.py      a folder of result files -> the tidy table of all results (and what was wrong with the files)
style.py      the one place for labels, colours, hatches, line styles, sizes; titles, units and direction of metrics
captions.py   words: conditions, what is missing, what was found
page.py       a page of panels with title, legend and caption; saving, byte for byte the same each time
bars.py       figures of bars          lines.py   curves
script.py     the command line that all plot scripts share
report.py     the HTML report, with report.html.j2, report.css and report.js
"""
