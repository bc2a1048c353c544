"""Replicate's API over one's own GPUs: models, versions, trainings, predictions, files and webhooks.

`serve` starts what one machine needs; `api` answers requests and writes records; a `worker` on each GPU runs the
repository's Cog models, in Cog's own server, and publishes what they make. All that is shared lies in PostgreSQL
(`records`, `jobs`) and in a store of files (`files`). Begin with `runs`: what a training or prediction goes through.
"""
