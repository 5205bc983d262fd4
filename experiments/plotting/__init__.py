"""From result files to figures and the report. Needs numpy and matplotlib; never torch, never transformers.

names.py      what a file's name says: kind, data set, method, mode, backend
records.py    what was measured, as plain records; figures that follow from others
reading.py    a folder of result files -> ResultSet (records, and what was wrong with the files)
style.py      the one place for labels, colours, hatches, line styles and sizes
metrics.py    the table of what can be drawn: titles, units, direction
series.py     which series and cells a figure holds, and which are missing
page.py       a figure laid out in inches: title, legend, panels, caption
bars.py       grouped bars          lines.py   curves
output.py     saving, byte for byte the same each time
script.py     the command line that all plot scripts share
"""
