//! What the program does besides being the daemon, each in a process of its own: `-c`, `-l`, `check-config` and `keygen`.

mod check;
mod configure;
mod faults;
mod keys;
mod program;
mod terminal;
