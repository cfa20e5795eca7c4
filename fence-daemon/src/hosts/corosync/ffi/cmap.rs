//! `corosync/cmap.h`: corosync's map of its configuration.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::{BorrowedFd, RawFd};

use super::super::no_group::NoGroup;
use super::{Libraries, NO_SECTIONS, NOT_EXIST, OK, ONE, TRY_AGAIN, descriptor, done, functions, said};

/// `CMAP_TRACK_ADD`, `_DELETE`, `_MODIFY` and `_PREFIX`.
const TRACK: i32 = 4 | 1 | 2 | 8;
/// `CMAP_KEYNAME_MAXLEN` and a NUL.
const KEY_LENGTH: usize = 256;

/// `struct cmap_notify_value`.
#[repr(C)]
struct NotifyValue {
    kind: c_int,
    length: usize,
    data: *const c_void,
}

type Notify = extern "C" fn(u64, u64, i32, *const c_char, NotifyValue, NotifyValue, *mut c_void);

functions! { Functions from "libcmap.so.4":
    cmap_initialize(*mut u64);
    cmap_finalize(u64);
    cmap_fd_get(u64, *mut RawFd);
    cmap_dispatch(u64, c_int);
    cmap_get(u64, *const c_char, *mut c_void, *mut usize, *mut c_int);
    cmap_iter_init(u64, *const c_char, *mut u64);
    cmap_iter_next(u64, u64, *mut c_char, *mut usize, *mut c_int);
    cmap_iter_finalize(u64, u64);
    cmap_track_add(u64, *const c_char, i32, Notify, *mut c_void, *mut u64);
}

/// Nothing: the node list is read afresh after each dispatch.
extern "C" fn on_key(_: u64, _: u64, _: i32, _: *const c_char, _: NotifyValue, _: NotifyValue, _: *mut c_void) {}

/// A value of corosync's map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::hosts::corosync) enum Value {
    /// `CMAP_VALUETYPE_UINT32`.
    Number(u32),
    /// `CMAP_VALUETYPE_STRING`.
    Text(String),
}

/// A connection to corosync's map, which has its configuration.
pub(in crate::hosts::corosync) struct Map {
    cmap: Functions,
    handle: u64,
}

impl Map {
    /// Connects, and follows changes of keys that begin with `prefix`.
    ///
    /// # Errors
    /// corosync does not run.
    pub(in crate::hosts::corosync) fn connect(libraries: Libraries, prefix: &CStr) -> Result<Self, NoGroup> {
        let cmap = libraries.cmap;
        let mut handle = 0;
        // SAFETY: needed to call C. Sound because the place lives during the call.
        done("cmap_initialize", unsafe { (cmap.cmap_initialize)(&raw mut handle) })?;
        let map = Self { cmap, handle };
        let mut track = 0;
        // SAFETY: needed to call C. Sound because text and place live during the call, and the
        // callback does not look at its data, which is null.
        let status = unsafe {
            (cmap.cmap_track_add)(handle, prefix.as_ptr(), TRACK, on_key, std::ptr::null_mut(), &raw mut track)
        };
        done("cmap_track_add", status)?;
        Ok(map)
    }

    /// All keys that begin with `prefix`, with their values. Values of other types than [`Value`]'s
    /// are left out.
    pub(in crate::hosts::corosync) fn read(&self, prefix: &CStr) -> Result<Vec<(String, Value)>, NoGroup> {
        let mut iteration = 0;
        // SAFETY: needed to call C. Sound because text and place live during the call.
        let status = unsafe { (self.cmap.cmap_iter_init)(self.handle, prefix.as_ptr(), &raw mut iteration) };
        done("cmap_iter_init", status)?;
        let mut keys: Vec<CString> = Vec::new();
        let end = loop {
            let mut key = [0_u8; KEY_LENGTH];
            let (mut length, mut kind) = (0, 0);
            // SAFETY: needed to call C. Sound because the places live during the call, and the key
            // has room for the longest one and its NUL.
            let status = unsafe {
                (self.cmap.cmap_iter_next)(
                    self.handle,
                    iteration,
                    key.as_mut_ptr().cast(),
                    &raw mut length,
                    &raw mut kind,
                )
            };
            match (status, CStr::from_bytes_until_nul(&key)) {
                (OK, Ok(key)) => keys.push(key.to_owned()),
                (OK, Err(_)) => {}
                (status, _) => break status,
            }
        };
        // SAFETY: needed to free the iteration. Sound because it is open and not used any more.
        let _ = unsafe { (self.cmap.cmap_iter_finalize)(self.handle, iteration) };
        if end != NO_SECTIONS {
            done("cmap_iter_next", end)?;
        }
        let mut values = Vec::new();
        for key in keys {
            if let Some(value) = self.get(&key)? {
                values.push((key.to_string_lossy().into_owned(), value));
            }
        }
        Ok(values)
    }

    /// A key's value; `None` if it is gone, has another type or is longer than 1 KiB.
    fn get(&self, key: &CStr) -> Result<Option<Value>, NoGroup> {
        let mut bytes = [0_u8; 1024];
        let (mut length, mut kind) = (bytes.len(), 0);
        // SAFETY: needed to call C. Sound because the places live during the call, and the library
        // writes no more than the length that it is given.
        let status = unsafe {
            (self.cmap.cmap_get)(self.handle, key.as_ptr(), bytes.as_mut_ptr().cast(), &raw mut length, &raw mut kind)
        };
        // `CS_ERR_INVALID_PARAM`: it is longer.
        if matches!(status, NOT_EXIST | 7) {
            return Ok(None);
        }
        done("cmap_get", status)?;
        let bytes = bytes.get(..length).unwrap_or_default();
        Ok(match kind {
            6 => bytes.try_into().ok().map(|bytes| Value::Number(u32::from_ne_bytes(bytes))),
            11 => {
                let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
                Some(Value::Text(String::from_utf8_lossy(text).into_owned()))
            }
            _ => None,
        })
    }

    /// Takes what has come.
    pub(in crate::hosts::corosync) fn dispatch(&self) -> Result<(), NoGroup> {
        // SAFETY: needed to call C. Sound because the callback does nothing.
        let status = unsafe { (self.cmap.cmap_dispatch)(self.handle, ONE) };
        if status == TRY_AGAIN { Ok(()) } else { done("cmap_dispatch", status) }
    }

    /// Readable when there is something to dispatch.
    pub(in crate::hosts::corosync) fn descriptor(&self) -> Result<BorrowedFd<'_>, NoGroup> {
        descriptor("cmap_fd_get", self, self.cmap.cmap_fd_get, self.handle)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: needed to close the connection. Sound because nobody else has the handle.
        let _ = unsafe { (self.cmap.cmap_finalize)(self.handle) };
    }
}
