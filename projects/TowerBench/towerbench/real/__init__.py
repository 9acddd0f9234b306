"""The real suite: on data that the user has below --data. Every module is imported by the registry."""
