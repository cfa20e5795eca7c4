//! The packages of `cargo xtask dist`, in fresh Debian systems whose first process is systemd:
//! installed over a configured fence_virtd, used, removed, and fence_virtd again.

#[cfg(test)]
mod ansible;
#[cfg(test)]
mod contents;
#[cfg(test)]
mod foreign;
#[cfg(test)]
mod host;
#[cfg(test)]
mod hypervisor;
#[cfg(test)]
mod layer;
#[cfg(test)]
mod node;
#[cfg(test)]
mod selinux;
