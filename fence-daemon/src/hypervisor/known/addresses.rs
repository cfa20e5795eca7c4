//! Which running machines have an address that a client shows: Ethernet or vsock.

use fence_common::caller::Vouched;
use fence_common::hosts::GuestAddress;
use fence_net::neighbour::Mac;
use uuid::Uuid;

use super::table::{Entry, Table};

impl Table {
    /// The Ethernet addresses of all machines that may live here.
    pub(crate) fn addresses(&self) -> Vec<GuestAddress> {
        let guest = |uuid: &Uuid, entry: &Entry| Vouched { uuid: *uuid, name: entry.name.clone() };
        let of = |(uuid, entry): (&Uuid, &Entry)| {
            entry.macs.iter().map(|mac| GuestAddress { mac: *mac, guest: guest(uuid, entry) }).collect::<Vec<_>>()
        };
        self.domains().iter().filter(|(_, entry)| entry.may_live()).flat_map(of).collect()
    }

    /// The domains that run and have an interface with this Ethernet address.
    pub(crate) fn running_with(&self, mac: Mac) -> Vec<Uuid> {
        self.uuids_of(|entry| entry.macs.contains(&mac) && entry.may_live())
    }

    /// The domains that run and had this vsock number when they were looked at.
    pub(crate) fn running_with_cid(&self, cid: u32) -> Vec<Uuid> {
        self.uuids_of(|entry| entry.cid == Some(cid) && entry.may_live())
    }

    fn uuids_of(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<Uuid> {
        self.domains().iter().filter(|(_, entry)| wanted(entry)).map(|(uuid, _)| *uuid).collect()
    }
}
