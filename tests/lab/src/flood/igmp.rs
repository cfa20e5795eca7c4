//! IGMP noise: queries, reports and leaves of every version, in any name. It confuses bridge and
//! host about the members of the group.
//!
//! A host that hears another host's report holds back its own. A bridge that hears queries of a
//! router, and no report of the host, stops sending it the group's frames.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use etherparse::igmp::{
    GroupAddress, LeaveGroupType, MaxResponseCode, MembershipQueryType, MembershipQueryWithSourcesHeader,
    MembershipReportV1Type, MembershipReportV2Type, MembershipReportV3Header, ReportGroupRecordType,
    ReportGroupRecordV3Header,
};
use etherparse::{IgmpType, IpHeaders, IpNumber, Ipv4Header, Ipv4Options, PacketBuilder};
use fence_common::wire::DEFAULT_GROUP_V4;

const ALL_HOSTS: [u8; 4] = [224, 0, 0, 1];
const ALL_ROUTERS: [u8; 4] = [224, 0, 0, 2];
const REPORTS_V3: [u8; 4] = [224, 0, 0, 22];

/// The IP option "router alert", as in all IGMP of version 2 and later.
const ROUTER_ALERT: [u8; 4] = [0x94, 4, 0, 0];

/// An answer is due within a tenth of a second: as soon as can be asked for.
const AT_ONCE: u8 = 1;

/// All kinds of messages about the default group, from each of these addresses.
pub fn noise(senders: &[Ipv4Addr]) -> Result<Vec<Vec<u8>>> {
    let mut packets = Vec::new();
    for sender in senders {
        for (to, message, rest) in messages() {
            packets.push(packet(*sender, to, message, &rest)?);
        }
    }
    Ok(packets)
}

/// Where to, what, and what follows its head.
type Message = ([u8; 4], IgmpType, Vec<u8>);

fn messages() -> Vec<Message> {
    let group = DEFAULT_GROUP_V4;
    let group_address = GroupAddress::new(group);
    let everything = GroupAddress::new([0; 4]);
    let query = |to, max_response_time, group_address| -> Message {
        (to, IgmpType::MembershipQuery(MembershipQueryType { max_response_time, group_address }), Vec::new())
    };
    let query_v3 = |to, group_address| -> Message {
        let head = MembershipQueryWithSourcesHeader {
            max_response_code: MaxResponseCode(AT_ONCE),
            group_address,
            raw_byte_8: 2,
            qqic: 125,
            num_of_sources: 0,
        };
        (to, IgmpType::MembershipQueryWithSources(head), Vec::new())
    };
    let report_v3 = |record_type| -> Message {
        let record =
            ReportGroupRecordV3Header { record_type, aux_data_len: 0, num_of_sources: 0, multicast_address: group };
        let head = MembershipReportV3Header { flags: [0; 2], num_of_records: 1 };
        (REPORTS_V3, IgmpType::MembershipReportV3(head), record.to_bytes().to_vec())
    };
    vec![
        // This one comes first: the bridge waits that long before it believes in a router and
        // forwards only to members.
        query(ALL_HOSTS, AT_ONCE, everything),
        query(ALL_HOSTS, 0, everything),
        query(group, AT_ONCE, group_address),
        query_v3(ALL_HOSTS, everything),
        query_v3(group, group_address),
        (group, IgmpType::MembershipReportV1(MembershipReportV1Type { group_address }), Vec::new()),
        (group, IgmpType::MembershipReportV2(MembershipReportV2Type { group_address }), Vec::new()),
        report_v3(ReportGroupRecordType::MODE_IS_EXCLUDE),
        report_v3(ReportGroupRecordType::ALLOW_NEW_SOURCES),
        report_v3(ReportGroupRecordType::BLOCK_OLD_SOURCES),
        report_v3(ReportGroupRecordType::CHANGE_TO_INCLUDE_MODE),
        (ALL_ROUTERS, IgmpType::LeaveGroup(LeaveGroupType { group_address }), Vec::new()),
    ]
}

fn packet(from: Ipv4Addr, to: [u8; 4], message: IgmpType, rest: &[u8]) -> Result<Vec<u8>> {
    let mut header = Ipv4Header::new(0, 1, IpNumber::IGMP, from.octets(), to).context("IGMP")?;
    header.options = Ipv4Options::from(ROUTER_ALERT);
    let mut packet = Vec::new();
    let built = PacketBuilder::ip(IpHeaders::Ipv4(header, Default::default())).igmp(message);
    built.write(&mut packet, rest).context("IGMP")?;
    Ok(packet)
}
