"""The store of verdicts and of the labels that come back: SQLite by default, PostgreSQL by its URL.

tables       what is kept
records      what goes in and what comes back; the errors
database     one transaction: what is new of some records, into the tables
spool        records that wait for the database, on this machine's disk
store        the server's store: one thread that writes, nobody waits for it but feedback and labels
reading      the queues, labels in order, outcomes, export
migrations/  alembic's; run when a database is opened

an answer leaves   -> verdict, drawn for an audit or not      written soon
feedback comes     -> thumb: whoever answers chose himself     on a disk before it is acknowledged
a reviewer labels  -> label                                    likewise
"""
