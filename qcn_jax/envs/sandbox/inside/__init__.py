"""The programs that run inside a sandbox: standard library and pytest only, never imported by the host's stages.

`enter` builds the local back end's namespaces, `server` speaks with the host and owns the workspaces,
`zygote` forks what is untrusted, `runner` runs pytest in such a fork. They are copied into the image (docker)
or into the run time folder (local) as plain files.
"""
