/* Drop reasons: numbers and texts are stable. User space reads this file for the texts (the comment of each line). */
#ifndef CILIATE_DROP_H
#define CILIATE_DROP_H

#define FORWARDED 0                    /* Forwarded */
#define DROP_SOURCE_MAC 130            /* Invalid source mac */
#define DROP_DESTINATION_MAC 131       /* Invalid destination mac */
#define DROP_SOURCE_IP 132             /* Invalid source ip */
#define DROP_POLICY 133                /* Policy denied */
#define DROP_INVALID 134               /* Invalid packet */
#define DROP_CT_INVALID_HEADER 135     /* CT: Truncated or invalid header */
#define DROP_CT_UNKNOWN_PROTOCOL 137   /* CT: Unknown L4 protocol */
#define DROP_UNSUPPORTED_L3 139        /* Unsupported L3 protocol */
#define DROP_MISSED_TAIL_CALL 140      /* Missed tail call */
#define DROP_WRITE_ERROR 141           /* Error writing to packet */
#define DROP_NO_TUNNEL_KEY 147         /* Error retrieving tunnel key */
#define DROP_UNKNOWN_TARGET 150        /* Unknown L3 target address */
#define DROP_NOT_LOCAL 151             /* Not a local target address */
#define DROP_NO_LOCAL_CONTAINER 152    /* No matching local container found */
#define DROP_CSUM_L3 153               /* Error while correcting L3 checksum */
#define DROP_CSUM_L4 154               /* Error while correcting L4 checksum */
#define DROP_CT_CREATE 155             /* CT: Map insertion failed */
#define DROP_IPV6_EXTENSION 156        /* Invalid IPv6 extension header */
#define DROP_FRAGMENT 157              /* Fragment without its first part */
#define DROP_NO_BACKEND 158            /* Service backend not found */
#define DROP_NO_TUNNEL_ENDPOINT 160    /* No tunnel/encapsulation endpoint */
#define DROP_NO_CONFIG 165             /* No configuration available to perform policy decision */
#define DROP_UNSUPPORTED_L2 166        /* Unsupported L2 protocol */
#define DROP_NAT_NO_MAPPING 167        /* No mapping for NAT masquerade */
#define DROP_NAT_PROTOCOL 168          /* Unsupported protocol for NAT masquerade */
#define DROP_FALSE_ERROR 187           /* ICMP error about a packet that its sender did not get */
#define DROP_NAT_SHARE 188             /* More masqueraded flows than a pod may have */
#define DROP_CLIENT_SHARE 189          /* More of the node's ports than a client outside may have */
#define DROP_HOUSEKEEPING 190          /* Link housekeeping not needed here (RS, MLD, DAD, NA, ARP reply) */
#define DROP_NO_PROXY 191              /* Policy needs an L7 proxy and none is active */
#define DROP_TTL_EXCEEDED 192          /* TTL or hop limit exceeded */
#define DROP_FLOW_ENDED 193            /* Answer of a flow that policy ended */
#define DROP_UNKNOWN_NODE 194          /* Tunnel packet of an unknown node */
#define DROP_TUNNEL_IDENTITY 195       /* Tunnel packet with an identity that no sender has */
#define DROP_NO_SERVICE 196            /* Answer of a service that is gone */
#define DROP_TUNNEL_OF_POD 197         /* Tunnel packet of a pod */
#define DROP_LINK_RATE 198             /* Too many link messages (ARP, neighbour discovery, MLD) of an endpoint */
#define DROP_SOURCE_RANGE 199          /* Source is in no range of the service */

#endif
