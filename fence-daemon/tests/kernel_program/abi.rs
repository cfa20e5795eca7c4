//! An object that was built with another version of the boundary than the daemon.

use fence_common::boundary::{ABI_VERSION, name};
use fence_daemon::intake::kernel::{Error, KernelProgram};

use crate::bench::{LISTENER, key, object, require_root};

/// Where the content of a section begins in an ELF file of 64 bits and this machine's byte order.
fn section(object: &[u8], wanted: &str) -> usize {
    let number = |at: usize, len: usize| -> usize {
        let bytes = object[at..at + len].iter().enumerate();
        bytes
            .map(|(index, &byte)| {
                usize::from(byte) << (8 * if cfg!(target_endian = "little") { index } else { len - 1 - index })
            })
            .sum()
    };
    let (headers, size, count, names) = (number(0x28, 8), number(0x3a, 2), number(0x3c, 2), number(0x3e, 2));
    let header = |index: usize| headers + index * size;
    let strings = number(header(names) + 0x18, 8);
    let found = (0..count).map(header).find(|&header| {
        let name = strings + number(header, 4);
        object[name..].starts_with(wanted.as_bytes()) && object[name + wanted.len()] == 0
    });
    number(found.unwrap_or_else(|| panic!("no section {wanted}")) + 0x18, 8)
}

#[test]
fn an_object_of_another_version_is_refused() {
    require_root();
    let mut object = object();
    let at = section(&object, name::ABI);
    assert_eq!(object[at..at + 4], ABI_VERSION.to_ne_bytes());
    drop(KernelProgram::load(&object, &LISTENER, Some(&key())).unwrap());
    for other in [0, ABI_VERSION + 1, u32::MAX] {
        object[at..at + 4].copy_from_slice(&other.to_ne_bytes());
        let refused = KernelProgram::load(&object, &LISTENER, Some(&key()));
        assert!(matches!(refused, Err(Error::Abi(version)) if version == other), "{refused:?}");
    }
}
