//! `corosync/cpg.h`: closed process groups.

use std::cell::RefCell;
use std::ffi::{c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::os::fd::{BorrowedFd, RawFd};

use super::super::super::transport::{Departure, Member};
use super::super::no_group::NoGroup;
use super::{Libraries, NO_SECTIONS, NOT_EXIST, OK, ONE, TRY_AGAIN, descriptor, done, functions, said};

/// `CPG_TYPE_AGREED`: one total order.
const AGREED: c_int = 2;
/// `CPG_ITERATION_ONE_GROUP`.
const ONE_GROUP: c_int = 2;

/// `struct cpg_name`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Name {
    length: u32,
    value: [u8; 128],
}

impl Name {
    /// `text` must be shorter than 128 bytes, which the two constants of this room are.
    fn new(text: &str) -> Self {
        let mut name = Self { length: 0, value: [0; 128] };
        for (place, byte) in name.value.iter_mut().zip(text.bytes()) {
            *place = byte;
            name.length += 1;
        }
        name
    }
}

/// `struct cpg_address`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Address {
    node: u32,
    pid: u32,
    reason: u32,
}

/// `cpg_callbacks_t`.
#[repr(C)]
struct CpgCallbacks {
    deliver: Deliver,
    changed: Changed,
}

type Deliver = extern "C" fn(u64, *const Name, u32, u32, *const c_void, usize);
type Changed = extern "C" fn(u64, *const Name, *const Address, usize, *const Address, usize, *const Address, usize);

/// `struct cpg_iteration_description_t`.
#[repr(C)]
struct Description {
    group: Name,
    node: u32,
    pid: u32,
}

/// `struct iovec`.
#[repr(C)]
struct Part {
    base: *const c_void,
    length: usize,
}

functions! { Functions from "libcpg.so.4":
    cpg_initialize(*mut u64, *const CpgCallbacks);
    cpg_finalize(u64);
    cpg_fd_get(u64, *mut RawFd);
    cpg_dispatch(u64, c_int);
    cpg_join(u64, *const Name);
    cpg_leave(u64, *const Name);
    cpg_local_get(u64, *mut c_uint);
    cpg_mcast_joined(u64, c_int, *const Part, c_uint);
    cpg_iteration_initialize(u64, c_int, *const Name, *mut u64);
    cpg_iteration_next(u64, *mut Description);
    cpg_iteration_finalize(u64);
}

/// What a group's callbacks brought.
#[derive(Debug)]
pub(in crate::hosts::corosync) enum Raw {
    /// A member's message.
    Message(Member, Vec<u8>),
    /// The members now, and those that left.
    Members(Vec<Member>, Vec<(Member, Departure)>),
}

thread_local! {
    /// Where callbacks leave what they bring. corosync's libraries call them on the thread that
    /// dispatches, during the call, so no pointer of ours goes through C.
    static BROUGHT: RefCell<Vec<Raw>> = const { RefCell::new(Vec::new()) };
}

/// Leaves something for the thread that dispatches. It never panics: a second borrow is impossible,
/// as nothing is called during the first.
fn bring(raw: Raw) {
    BROUGHT.with(|brought| {
        if let Ok(mut brought) = brought.try_borrow_mut() {
            brought.push(raw);
        }
    });
}

extern "C" fn on_message(_: u64, _: *const Name, node: u32, pid: u32, bytes: *const c_void, length: usize) {
    let bytes = if bytes.is_null() || length == 0 {
        Vec::new()
    } else {
        // SAFETY: needed because the message comes as pointer and length. Sound because libcpg
        // lends that many bytes for the time of the callback, and they are copied here.
        unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), length) }.to_vec()
    };
    bring(Raw::Message(Member { node, pid }, bytes));
}

extern "C" fn on_change(
    _: u64,
    _: *const Name,
    all: *const Address,
    count: usize,
    left: *const Address,
    left_count: usize,
    _: *const Address,
    _: usize,
) {
    // SAFETY: needed because lists come as pointer and length. Sound because libcpg lends arrays of
    // that length for the time of the callback.
    let all = unsafe { addresses(all, count) };
    // SAFETY: as above.
    let left = unsafe { addresses(left, left_count) };
    let member = |address: &Address| Member { node: address.node, pid: address.pid };
    let left = left.iter().map(|address| (member(address), reason(address.reason)));
    bring(Raw::Members(all.iter().map(member).collect(), left.collect()));
}

/// # Safety
/// `list` is null, or points to `count` addresses that stay during `'a`.
unsafe fn addresses<'a>(list: *const Address, count: usize) -> &'a [Address] {
    if list.is_null() || count == 0 {
        return &[];
    }
    // SAFETY: needed to read the list. Sound by the caller's word.
    unsafe { std::slice::from_raw_parts(list, count) }
}

/// `cpg_reason_t`.
fn reason(reason: u32) -> Departure {
    match reason {
        2 => Departure::Itself,
        3 => Departure::HostLost,
        5 => Departure::ProcessEnded,
        other => Departure::Other(other),
    }
}

/// A connection to corosync's groups. It ends when it is dropped. It belongs to one thread, that of
/// its callbacks.
pub(in crate::hosts::corosync) struct Groups {
    cpg: Functions,
    handle: u64,
    /// Keeps the value on its thread.
    _thread: PhantomData<*const ()>,
}

impl Groups {
    /// # Errors
    /// corosync does not run, or does not want us.
    pub(in crate::hosts::corosync) fn connect(libraries: Libraries) -> Result<Self, NoGroup> {
        let cpg = libraries.cpg;
        let callbacks = CpgCallbacks { deliver: on_message, changed: on_change };
        let mut handle = 0;
        // SAFETY: needed to call C. Sound because both places live during the call, and libcpg
        // copies the callbacks.
        let status = unsafe { (cpg.cpg_initialize)(&raw mut handle, &raw const callbacks) };
        done("cpg_initialize", status)?;
        BROUGHT.take();
        Ok(Self { cpg, handle, _thread: PhantomData })
    }

    /// Joins a group.
    pub(in crate::hosts::corosync) fn join(&self, group: &str) -> Result<Sent, NoGroup> {
        let name = Name::new(group);
        // SAFETY: needed to call C. Sound because the name lives during the call.
        sent("cpg_join", unsafe { (self.cpg.cpg_join)(self.handle, &raw const name) })
    }

    /// Leaves a group. A failure means that the connection is lost, which is as good.
    pub(in crate::hosts::corosync) fn leave(&self, group: &str) {
        let name = Name::new(group);
        // SAFETY: as in `join`.
        let _ = unsafe { (self.cpg.cpg_leave)(self.handle, &raw const name) };
    }

    /// The node id of this host.
    pub(in crate::hosts::corosync) fn node(&self) -> Result<u32, NoGroup> {
        let mut node = 0;
        // SAFETY: needed to call C. Sound because the place lives during the call.
        done("cpg_local_get", unsafe { (self.cpg.cpg_local_get)(self.handle, &raw mut node) })?;
        Ok(node)
    }

    /// Sends to the group that was joined.
    pub(in crate::hosts::corosync) fn send(&self, parts: [&[u8]; 2]) -> Result<Sent, NoGroup> {
        let parts = parts.map(|part| Part { base: part.as_ptr().cast(), length: part.len() });
        // SAFETY: needed to call C. Sound because the parts live during the call, and libcpg copies
        // them.
        sent("cpg_mcast_joined", unsafe { (self.cpg.cpg_mcast_joined)(self.handle, AGREED, parts.as_ptr(), 2) })
    }

    /// Takes what has come, at most one message or change.
    pub(in crate::hosts::corosync) fn dispatch(&self) -> Result<Vec<Raw>, NoGroup> {
        // SAFETY: needed to call C. Sound because the handle is this thread's own; the callbacks
        // only push to this thread's list.
        let status = unsafe { (self.cpg.cpg_dispatch)(self.handle, ONE) };
        let brought = BROUGHT.take();
        // "Try again" means that there was nothing.
        if status != TRY_AGAIN {
            done("cpg_dispatch", status)?;
        }
        Ok(brought)
    }

    /// The members of another group, which is only looked at.
    pub(in crate::hosts::corosync) fn members_of(&self, group: &str) -> Result<Vec<Member>, NoGroup> {
        let name = Name::new(group);
        let mut iteration = 0;
        // SAFETY: needed to call C. Sound because both places live during the call.
        let status =
            unsafe { (self.cpg.cpg_iteration_initialize)(self.handle, ONE_GROUP, &raw const name, &raw mut iteration) };
        if status == NOT_EXIST {
            return Ok(Vec::new());
        }
        done("cpg_iteration_initialize", status)?;
        let mut members = Vec::new();
        let mut one = Description { group: name, node: 0, pid: 0 };
        let end = loop {
            // SAFETY: needed to call C. Sound because the place lives during the call, and the
            // iteration is open.
            match unsafe { (self.cpg.cpg_iteration_next)(iteration, &raw mut one) } {
                OK => members.push(Member { node: one.node, pid: one.pid }),
                status => break status,
            }
        };
        // SAFETY: needed to free the iteration. Sound because it is open and not used any more.
        let _ = unsafe { (self.cpg.cpg_iteration_finalize)(iteration) };
        if end != NO_SECTIONS {
            done("cpg_iteration_next", end)?;
        }
        members.sort_unstable();
        members.dedup();
        Ok(members)
    }

    /// Readable when there is something to dispatch.
    pub(in crate::hosts::corosync) fn descriptor(&self) -> Result<BorrowedFd<'_>, NoGroup> {
        descriptor("cpg_fd_get", self, self.cpg.cpg_fd_get, self.handle)
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        // SAFETY: needed to close the connection. Sound because nobody else has the handle.
        let _ = unsafe { (self.cpg.cpg_finalize)(self.handle) };
    }
}

/// Whether corosync took something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::hosts::corosync) enum Sent {
    /// It did.
    Taken,
    /// Not now: its queue is full, or the membership changes.
    NotNow,
}

fn sent(call: &'static str, status: c_int) -> Result<Sent, NoGroup> {
    if status == TRY_AGAIN { Ok(Sent::NotNow) } else { done(call, status).map(|()| Sent::Taken) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_and_the_layout_is_the_headers() {
        assert_eq!(Name::new("fence-xdp").length, 9);
        assert_eq!(Name::new(&"x".repeat(200)).length, 128);
        assert_eq!((size_of::<Name>(), size_of::<Address>(), size_of::<Description>()), (132, 12, 140));
    }

    #[test]
    fn what_callbacks_bring_is_copied() {
        let name = Name::new("x");
        on_message(0, &raw const name, 1, 2, b"hello".as_ptr().cast(), 5);
        on_message(0, &raw const name, 1, 2, std::ptr::null(), 5);
        let lists = [Address { node: 1, pid: 2, reason: 1 }, Address { node: 3, pid: 4, reason: 5 }];
        on_change(0, &raw const name, lists.as_ptr(), 1, lists[1..].as_ptr(), 1, std::ptr::null(), 0);
        let brought = BROUGHT.take();
        let member = Member { node: 1, pid: 2 };
        assert!(matches!(&brought[0], Raw::Message(from, bytes) if *from == member && bytes == b"hello"));
        assert!(matches!(&brought[1], Raw::Message(_, bytes) if bytes.is_empty()));
        let left = (Member { node: 3, pid: 4 }, Departure::ProcessEnded);
        assert!(matches!(&brought[2], Raw::Members(all, gone) if all == &[member] && gone == &[left]));
    }
}
