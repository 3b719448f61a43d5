"""One readable program per verb: the only place where rooms are put together."""
