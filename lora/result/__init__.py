"""What leaves a training: the settings that made it, the report page, the model card, the upload.

In: what was decided, learned and drawn, as plain values. Out: files for the tar, and a repository on the Hub.
Begin with `record` (request.json and the header of the weights), then `report` (with `preview`,
`curve` and the template `page.html`), `verdict`, `tarball` and `hub`. `drawing` writes a picture with its settings.
"""
