//! What is wrong with files, processes and the host.
