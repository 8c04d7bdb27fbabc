"""The processes that train one model together: their communication, devices and parts of a batch."""
