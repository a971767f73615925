//! What findings are about: each code is a heading of `docs/checks.md` that explains it.
//!
//! A code is a promise: it keeps its meaning, and none is used again for another one.

macro_rules! codes {
    ($($(#[$about:meta])* $name:ident = $code:literal;)*) => {
        $($(#[$about])* pub const $name: &str = $code;)*
        /// All of them, in the order of the groups.
        pub const ALL: &[&str] = &[$($name),*];
    };
}

codes! {
    /// The configuration is valid.
    CONFIG = "check-config";
    /// No variable of the environment looks like a misspelt setting.
    CONFIG_NOTES = "check-config-notes";

    /// The daemon answers.
    DAEMON = "check-daemon";
    /// What runs is what is installed, and what asks.
    VERSION = "check-version";
    /// No connection ended by a defect of the program.
    PANICS = "check-panics";
    /// The daemon may open enough files.
    FILES = "check-files";
    /// The daemon stays within its memory.
    MEMORY = "check-memory";
    /// Handshakes on the mesh port succeed.
    HANDSHAKES = "check-handshakes";
    /// There was room for every connection.
    OVERLOAD = "check-overload";
    /// No other meshd runs in this network namespace.
    OTHER_MESHD = "check-other-meshd";

    /// CAP_NET_ADMIN.
    CAP_NET_ADMIN = "check-cap-net-admin";
    /// CAP_NET_BIND_SERVICE.
    CAP_NET_BIND_SERVICE = "check-cap-net-bind-service";
    /// CAP_DAC_READ_SEARCH.
    CAP_DAC_READ_SEARCH = "check-cap-dac-read-search";

    /// The kernel has nf_tables.
    KERNEL = "check-kernel";
    /// nf_tables can redirect.
    NFT_REDIRECT = "check-nft-redirect";
    /// nf_tables can ask the routing table.
    NFT_FIB = "check-nft-fib";
    /// nf_tables can reset connections.
    NFT_REJECT = "check-nft-reject";
    /// nf_tables can mark connections.
    NFT_CONNTRACK = "check-nft-conntrack";
    /// nf_tables has counters.
    NFT_COUNTERS = "check-nft-counters";
    /// Tables can belong to a process.
    NFT_OWNER = "check-nft-owner";
    /// Such a table can outlive its process.
    NFT_PERSIST = "check-nft-persist";
    /// The kernel has policy routing.
    POLICY_ROUTING = "check-policy-routing";
    /// The kernel has transparent sockets.
    TRANSPARENT = "check-transparent";
    /// The kernel says who owns a socket.
    SOCK_DIAG = "check-sock-diag";
    /// Units can be told from their cgroups.
    CGROUPS = "check-cgroups";
    /// The table of tracked connections has room.
    CONNTRACK = "check-conntrack";
    /// Outgoing connections do not take the daemon's ports.
    PORT_RANGE = "check-port-range";
    /// Services do not take over the mark of their connections.
    FWMARK_ACCEPT = "check-fwmark-accept";
    /// The loopback interface is up.
    LOOPBACK = "check-loopback";
    /// The size of memory pages.
    PAGE_SIZE = "check-page-size";
    /// The ciphers suit the processor.
    CIPHERS = "check-ciphers";

    /// The mesh port is the daemon's.
    PORT_MESH = "check-port-mesh";
    /// The capture port is the daemon's.
    PORT_CAPTURE = "check-port-capture";
    /// The admin port is not somebody else's.
    PORT_ADMIN = "check-port-admin";

    /// The capture rules are in place, unchanged.
    CAPTURE = "check-capture";
    /// The capture rules are protected from others.
    RULES_OWNER = "check-rules-owner";
    /// The policy route is in place.
    POLICY_ROUTE = "check-policy-route";
    /// Nothing is left of a daemon that is gone.
    LEFTOVERS = "check-leftovers";

    /// Firewall rules let the mesh port through.
    FIREWALL_PORT = "check-firewall-port";
    /// Firewall rules let deliveries on loopback through.
    FIREWALL_DELIVERY = "check-firewall-delivery";
    /// No firewall rule restricts a port by source.
    FIREWALL_SOURCE = "check-firewall-source";
    /// There are no rules of the older iptables.
    IPTABLES = "check-iptables";

    /// The clock is not behind what authorities signed.
    CLOCK = "check-clock";
    /// The clock is set.
    CLOCK_SET = "check-clock-set";

    /// The state directory can be used.
    STATE = "check-state";
    /// The state directory is the daemon's alone.
    STATE_MODE = "check-state-mode";
    /// The state files are whole.
    STATE_FILES = "check-state-files";
    /// The disk has room.
    DISK = "check-disk";
    /// What only this host has is in a backup.
    BACKUP = "check-backup";

    /// The node is a member.
    MEMBER = "check-member";
    /// The roster has room.
    ROSTER = "check-roster";
    /// An authority is in reach.
    AUTHORITY = "check-authority";
    /// More than one authority signs.
    AUTHORITIES = "check-authorities";
    /// Members are heard.
    GOSSIP = "check-gossip";
    /// The hosts of one fleet are one mesh.
    FLEET_SPLIT = "check-fleet-split";
    /// The mesh does not move into another one, or this host could follow.
    MOVING = "check-moving";
    /// No other mesh is on the LAN.
    OTHER_MESH = "check-other-mesh";
    /// A person has the recovery key of the mesh.
    RECOVERY_KEY = "check-recovery-key";

    /// A fleet token can be used, and is gone when it was.
    FLEET_TOKEN = "check-fleet-token";
    /// Nobody is let in with the fleet token for longer than needed.
    ENROLLMENT = "check-enrollment";

    /// The roots of the mesh are in date.
    BUNDLE = "check-bundle";
    /// No root ends soon.
    ROOT_END = "check-root-end";
    /// The SVIDs are in date and renewed in time.
    SVID = "check-svid";
    /// Workloads have SVIDs of their own.
    SVID_FALLBACK = "check-svid-fallback";

    /// A handshake with each member succeeds.
    PEER = "check-peer";
    /// The members run one version.
    PEER_VERSION = "check-peer-version";
    /// The members are in one mode.
    PEER_MODE = "check-peer-mode";
    /// The clocks of the members agree.
    PEER_CLOCK = "check-peer-clock";

    /// Addresses belong to one member each.
    ADDRESS = "check-address";
    /// Somebody answers at captured addresses.
    ADDRESS_SILENT = "check-address-silent";
    /// Every member has a captured address.
    ADDRESS_MISSING = "check-address-missing";
    /// This host has an address to publish.
    ADDRESS_OWN = "check-address-own";

    /// There is a LAN to look for members on.
    MDNS = "check-mdns";
    /// Multicast passes.
    MULTICAST = "check-multicast";
    /// Another responder on the same port does not get in the way.
    RESPONDER = "check-responder";

    /// Members do not connect in plaintext.
    PLAINTEXT = "check-plaintext";
    /// No connection with a member is older than capture.
    OLDER = "check-older-connections";
    /// Services of members are not on ports that are never captured.
    SKIP_PORTS = "check-skip-ports";
    /// UDP between members.
    UDP = "check-udp";
    /// Containers of this host are covered.
    CONTAINERS = "check-containers";
}
