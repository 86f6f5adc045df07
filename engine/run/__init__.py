"""One merge from its start to the published files: plan, session, recovery, manifest, verify."""
