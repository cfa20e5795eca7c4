//! What the program does besides being the daemon, each in a process of its own: `-c`, `-l`,
//! `check-config`, `keygen`, `status` and `top`.

#[cfg(test)]
mod check;
#[cfg(test)]
mod configure;
mod configure_listeners;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod keys;
#[cfg(test)]
mod program;
#[cfg(test)]
mod session;
#[cfg(test)]
mod terminal;
#[cfg(test)]
mod watch;
