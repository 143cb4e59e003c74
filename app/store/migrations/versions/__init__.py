"""One file a change of the tables. A released file is never edited: what follows it is a new one."""
