"""report.html: what a run has shown, as one file for a browser; and runs compared.

run.py       everything that a root holds, as one plain object
lines.py     utterances: read, joined over models, filed by what they are to be shown with
align.py     words beside words, and which were taken for which
curves.py    what events.jsonl says of the training, step by step
lengths.py   clips by their length
paired.py    the difference of two error rates on the same clips, with its interval
words.py     figures as people read them
tables.py    the page's tables; figures.py, search_figures.py its plots, as plotly.js takes them
page.py      the page; templates/ holds its parts
compare.py   runs side by side

Nothing here imports torch, Ray or jobs: a laptop makes the page of a run as well as the job itself does at its end.
"""
