"""What `script/bench quality` is made of.

`recipes` are the settings to compare, `cell` is one training to do, `training` does it by the project's own job,
`scores` draws and counts, `words` are the other words that it draws under, `table` adds the results up.
"""
