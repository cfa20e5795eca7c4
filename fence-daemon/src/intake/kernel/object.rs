//! The object as this kernel can take it.

use aya::util::KernelVersion;

/// The section of an XDP program that takes frames in several pieces, and of one that wants them in one. The kernel refuses the former before
/// Linux 5.18; the latter keeps large MTUs from an interface whose driver runs it.
const IN_PIECES: &[u8] = b"xdp.frags\0";
const IN_ONE: &[u8] = b"xdp\0";

/// A copy for the kernel that runs. Aligned, as the ELF reader wants it: the allocator's memory is, an included file's need not be.
pub(super) fn for_this_kernel(object: &[u8]) -> Vec<u8> {
    let knows_pieces = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(5, 18, 0));
    if knows_pieces { object.to_vec() } else { in_one_piece(object) }
}

/// A copy whose XDP program wants frames in one piece: nothing but a name tells the two apart. It stands in the table of the sections' names, and
/// in that of the types.
#[must_use]
pub fn in_one_piece(object: &[u8]) -> Vec<u8> {
    let mut copy = object.to_vec();
    let mut rest = copy.as_mut_slice();
    while let Some(at) = rest.windows(IN_PIECES.len()).position(|window| window == IN_PIECES) {
        let Some((name, behind)) = rest.get_mut(at..).and_then(|found| found.split_at_mut_checked(IN_PIECES.len()))
        else {
            break;
        };
        name.fill(0);
        name.iter_mut().zip(IN_ONE).for_each(|(to, from)| *to = *from);
        rest = behind;
    }
    copy
}
