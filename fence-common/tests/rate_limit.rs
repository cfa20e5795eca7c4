//! The rate limits against those who have the key, or another one's addresses.

use fence_common::memory_store::MemoryStore;
use fence_common::rate_limit::{self, Limits, Room, Sender, Store, TRUSTED_MAX};
use fence_common::replay_cache::DatagramId;
use fence_common::verdict::Verdict;

const SECOND: u64 = 1_000_000_000;

fn sender(number: u32) -> Sender {
    let [_, a, b, c] = number.to_be_bytes();
    let mut ip = [0; 16];
    ip[..4].copy_from_slice(&[10, a, b, c]);
    Sender { ip, mac: [2, 0, 0, a, b, c], family: 2 }
}

fn datagram_id(number: u32) -> DatagramId {
    DatagramId { digest: u128::from(number + 1).to_be_bytes() }
}

/// A datagram with a wrong digest.
fn wrong(records: &mut MemoryStore, sender: &Sender, now: u64) -> Result<(), Verdict> {
    rate_limit::before_digest(records, sender, &datagram_id(0), &Limits::default(), now)?;
    rate_limit::after_failure(records, sender, &Limits::default(), now);
    Ok(())
}

/// A request with a right digest.
fn right(records: &mut MemoryStore, sender: &Sender, number: u32, now: u64) -> Result<(), Verdict> {
    let limits = Limits::default();
    rate_limit::before_digest(records, sender, &datagram_id(number), &limits, now)?;
    rate_limit::before_delivery(records, sender, Room::Ample, &limits, now)
}

/// Both addresses of a sender can be forged by any host on its segment.
#[test]
fn wrong_digests_in_the_name_of_a_trusted_sender_do_not_starve_it() {
    let mut records = MemoryStore::default();
    let honest = sender(1);
    assert_eq!(right(&mut records, &honest, 1, SECOND), Ok(()));
    for round in 0..100_000 {
        let _ = wrong(&mut records, &honest, 2 * SECOND + round);
    }
    assert_eq!(right(&mut records, &honest, 2, 2 * SECOND + 100_000), Ok(()), "its request was not looked at");
}

/// Who has the key can send right requests from as many addresses as it makes up.
#[test]
fn a_holder_of_the_key_pushes_no_trusted_sender_out() {
    let mut records = MemoryStore::default();
    let (honest, limits) = (sender(1), Limits::default());
    assert_eq!(right(&mut records, &honest, 1, SECOND), Ok(()));
    let many = u32::try_from(2 * TRUSTED_MAX).unwrap();
    for number in 2..many {
        let _ = right(&mut records, &sender(number), number, 2 * SECOND + u64::from(number) * 1000);
    }
    // And then strangers flood.
    for number in 0..20_000 {
        let _ = wrong(&mut records, &sender(many + number), 4 * SECOND);
    }
    assert_eq!(
        rate_limit::before_digest(&mut records, &honest, &datagram_id(2), &limits, 4 * SECOND),
        Ok(()),
        "it is forgotten"
    );
}

/// As many addresses as one likes are together no more than one sender.
#[test]
fn made_up_addresses_share_one_bucket() {
    let mut records = MemoryStore::default();
    let delivered = (0..100_000_u32).filter(|&number| right(&mut records, &sender(number), number, SECOND).is_ok());
    assert!(delivered.count() <= 2 * 512, "each made-up address has a bucket of its own");
    // An honest newcomer is known a second later.
    let mut honest = (0..5_u64).map(|n| right(&mut records, &sender(200_000), 200_000, (2 + n) * SECOND));
    assert!(honest.any(|served| served.is_ok()));
    assert_eq!(records.with_trusted(&sender(200_000), |trusted| trusted.deliveries > 0), Some(true));
}
