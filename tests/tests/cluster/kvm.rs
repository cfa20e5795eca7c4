//! A cluster of QEMU guests.
