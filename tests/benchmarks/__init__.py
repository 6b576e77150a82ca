"""`make bench`: what tracing costs, against nothing, empty programs, the prototype and tcppktlat."""
