"""The commands that people and CI run, and the Python behind them: `signature` reads Cog's inputs, `cli` the command
line, `train` trains."""
