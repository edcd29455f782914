"""The lab: attention mechanisms trained and measured under equal conditions, and the report about it."""
